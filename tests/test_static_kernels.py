"""Semi-structured kernels of static models: used for the layers that were timed to be faster so, and never else."""

from __future__ import annotations

import pytest

from stageprune import calibrate, sparsify
from support import inside, make_pipe, same_state, state_of
from zoo import make_pipeline

Q, UP, DOWN = "transformer_blocks.1.attn1.to_q", "transformer_blocks.1.ff.net.0.proj", "transformer_blocks.1.ff.net.2"


@pytest.fixture(scope="module")
def whole():
    """Inputs of every layer of the tiny DiT."""
    return calibrate(make_pipe(), [1, 2, 3] * 8, steps=5, layers="all")


@pytest.fixture(scope="module")
def static(whole):
    return sparsify(make_pipe(), whole, pattern="2:4")


class Fake:
    """Kernels that compress nothing; slower than dense ones on layers with fewer columns than `from_columns`."""

    def __init__(self, from_columns=0, refuse=None, broken=()):
        self.from_columns, self.refuse, self.broken, self.timed = from_columns, refuse, broken, []

    def refusal(self, weight):
        return self.refuse

    def compress(self, weight):
        if weight.shape[1] in self.broken:
            raise RuntimeError(f"shape {tuple(weight.shape)} is not supported\nand more lines")
        return weight.clone().mul_(1)

    def milliseconds(self, weight, bias, rows):
        self.timed.append((tuple(weight.shape), rows))
        sparse = len(self.timed) % 2 == 0  # dense first
        return 2.0 if not sparse else (1.0 if weight.shape[1] >= self.from_columns else 1.99)


def test_layers_run_sparse_where_that_is_faster(static):
    pipe, backend = make_pipe(), Fake(from_columns=100)
    with static.apply(pipe, backend=backend) as running:
        choices = {choice.path: choice for choice in running.choices}
    assert choices[DOWN].sparse and not choices[Q].sparse and not choices[UP].sparse
    assert choices[DOWN].why == "faster here: 1.000 ms against 2.000 ms dense for 32 rows"
    assert choices[Q].why.startswith("not faster here: 1.990 ms against 2.000 ms dense")
    assert len(backend.timed) == 6, "each shape is timed once, dense and sparse"
    assert "3 of 18 layers run by semi-structured kernels" in str(running)
    assert f"{DOWN}: zeros 0.5000, semi-structured, faster here" in str(running)


def test_layers_that_the_kernels_do_not_take(static):
    with static.apply(make_pipe(), backend=Fake(broken=(160,))) as running:
        choices = {choice.path: choice for choice in running.choices}
    assert not choices[DOWN].sparse and choices[Q].sparse
    assert choices[DOWN].why == "the semi-structured kernels do not take it: shape (40, 160) is not supported"


def test_kernels_that_are_not_there(static, whole):
    with static.apply(make_pipe()) as running:
        assert {choice.why for choice in running.choices} == {
            "semi-structured kernels need an NVIDIA GPU, the layer is on cpu"
        }
    unstructured = sparsify(make_pipe(), whole, pattern=0.5)
    with unstructured.apply(make_pipe(), backend=Fake()) as running:
        assert {choice.why for choice in running.choices} == {"semi-structured kernels are for 2:4, its zeros are not"}
    sparser = sparsify(make_pipe(), whole, pattern="1:4")
    with sparser.apply(make_pipe(), backend=Fake()) as running:
        assert all(choice.sparse for choice in running.choices), "1:4 is 2:4 too"
    with static.apply(make_pipe(), kernels="dense", backend=Fake()) as running:
        assert not any(choice.sparse for choice in running.choices)


def test_convolutions_have_no_sparse_kernel():
    pipe = make_pipeline("sd15")
    model = sparsify(pipe, pattern="2:4", method="magnitude", kinds=["channel"])
    with model.apply(pipe, backend=Fake()) as running:
        assert {choice.why for choice in running.choices} == {"torch has no semi-structured kernel for convolutions"}


@pytest.mark.parametrize("break_at", [1, 3])
def test_a_failure_while_applying_leaves_the_dense_model(static, break_at):
    class Failing(Fake):
        calls = 0

        def compress(self, weight):
            if weight.shape[1] == 160:
                self.calls += 1
                if self.calls == 1 + break_at:  # the first is the timing
                    raise KeyboardInterrupt
            return weight

    pipe = make_pipe()
    state, structure = state_of(pipe.transformer), inside(pipe.transformer)
    with pytest.raises(KeyboardInterrupt):
        static.apply(pipe, backend=Failing())
    assert same_state(state, state_of(pipe.transformer)) and inside(pipe.transformer) == structure
