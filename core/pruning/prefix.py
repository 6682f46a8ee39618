"""What a denoiser's blocks gave in a step, so that those before a change need not run again.

When one layer alone changes, every block that has ended before the layer's own begins gives what it gave before: on
average half of the denoiser. A remembered block stays where it is and returns its output; what follows is the host's
own forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..eager import eager
from ..groups import find_groups, width_groups

ROOM = 2**31
"""Bytes of outputs that are held in the host's memory at most."""


@dataclass
class _Call:
    """A call of the denoiser: when its blocks ran, by a clock that ticks at each begin and end, and what they gave."""

    inputs: Any
    begun: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    versions: list[tuple[str, Tensor, int]] = field(default_factory=list)

    def begin(self, path: str) -> None:
        if path in self.begun:  # it runs again, and its output was only the first one
            self.outputs.pop(path, None)
        self.begun.setdefault(path, self._tick())

    def end(self, path: str) -> bool:
        """Whether it ended for the first time."""
        return self.ended.setdefault(path, now := self._tick()) == now

    def before(self, changed: Iterable[str]) -> set[str]:
        """Remembered blocks that had ended before the first one began that holds a changed layer."""
        first = min(map(self._begun_around, changed), default=0)
        return {path for path in self.outputs if self.ended[path] < first}

    def forget_overwritten(self) -> None:
        """What was written into since is no longer what the block gave."""
        for path, tensor, version in self.versions:
            if tensor._version != version:
                self.outputs.pop(path, None)
        self.versions.clear()

    def _begun_around(self, path: str) -> int:
        """When the innermost block around a layer began; 0 if it is in none."""
        return max((when for block, when in self.begun.items() if f"{path}.".startswith(f"{block}.")), default=0)

    def _tick(self) -> int:
        return len(self.begun) + len(self.ended) + 1


class Prefix:
    """Outputs of blocks, remembered within `recording` and given back within `resumed`.

    Only a block that ran once in a call is remembered, and only while there is room; any other runs again. So does
    all of a call with other inputs. Less memory costs time, and never changes a result.

    Args:
        denoiser: the denoiser.
        blocks: paths of its blocks (see `blocks_of`).
        room: bytes that may be held (see `room_on`).

    Example:
        >>> prefix = Prefix(denoiser, blocks_of(denoiser), room_on(device))
        >>> with prefix.recording():
        ...     dense = denoiser(*inputs)
        >>> with replaced(denoiser, consumers), prefix.resumed(consumers):
        ...     changed = denoiser(*inputs)
    """

    def __init__(self, denoiser: nn.Module, blocks: Iterable[str], room: int) -> None:
        self.denoiser = denoiser
        self.blocks = tuple(blocks)
        self.room = room
        self.held = 0
        """Bytes that are held."""
        self._calls: list[_Call] = []
        self._storages: set[int] = set()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Remember what the blocks give in the calls within."""

        def call(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._calls.append(_Call((args, kwargs)))

        with ExitStack() as stack:
            stack.enter_context(eager())  # graphs would not call these hooks, or call them for good
            stack.callback(self.denoiser.register_forward_pre_hook(call, with_kwargs=True).remove)
            for path in self.blocks:
                block = self.denoiser.get_submodule(path)

                def begin(*_: Any, path: str = path) -> None:
                    self._calls[-1].begin(path)

                def end(_: nn.Module, args: Any, result: Any, path: str = path) -> None:
                    if self._calls[-1].end(path):
                        self._remember(path, result)

                stack.callback(block.register_forward_pre_hook(begin).remove)
                stack.callback(block.register_forward_hook(end).remove)
            yield
        for each in self._calls:
            each.forget_overwritten()

    @contextmanager
    def resumed(self, changed: Iterable[str]) -> Iterator[None]:
        """The same calls, each from the first block on that holds one of these layers.

        Args:
            changed: paths of all layers that have changed since the recording.
        """
        usable = [call.before(changed) for call in self._calls]
        waiting = iter(zip(self._calls, usable, strict=True))
        given: dict[str, Any] = {}

        def call(_: nn.Module, args: Any, kwargs: Any) -> None:
            given.clear()
            known, blocks = next(waiting, (None, ()))
            if known is not None and _equal(known.inputs, (args, kwargs)):
                given.update({path: known.outputs[path] for path in blocks})

        with ExitStack() as stack:
            stack.enter_context(eager())
            stack.callback(self.denoiser.register_forward_pre_hook(call, with_kwargs=True).remove)
            for path in set().union(*usable):
                block = self.denoiser.get_submodule(path)
                stack.callback(_put_back, block, block.__dict__.get("forward"))  # accelerate's hooks put one there

                def forward(*args: Any, path: str = path, own: Any = block.forward, **kwargs: Any) -> Any:
                    return given[path] if path in given else own(*args, **kwargs)

                block.forward = forward
            yield

    def _remember(self, path: str, output: Any) -> None:
        tensors = [*_tensors(output)]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        size = sum(count for pointer, count in sizes.items() if pointer not in self._storages)
        if self.held + size > self.room or any(tensor.is_inference() for tensor in tensors):
            return
        self.held += size
        self._storages |= set(sizes)
        self._calls[-1].outputs[path] = output
        self._calls[-1].versions += [(path, tensor, tensor._version) for tensor in tensors]


def blocks_of(denoiser: nn.Module) -> list[str]:
    """Paths of the members of the denoiser's module lists, of any depth, that have parameters and divide no group (as
    those of an attention's `to_out` do).
    """
    groups = width_groups(find_groups(denoiser))
    layers = [{row.path for row in group.producers} | {column.path for column in group.consumers} for group in groups]
    blocks = []
    for path, module in denoiser.named_modules():
        for index, member in enumerate(module if isinstance(module, nn.ModuleList) else ()):
            block = f"{path}.{index}"
            inside = [{f"{layer}.".startswith(f"{block}.") for layer in paths} for paths in layers]
            if all(len(each) == 1 for each in inside) and any(True for _ in member.parameters()):
                blocks.append(block)
    return blocks


def room_on(device: torch.device) -> int:
    """Bytes of outputs that may be held: a quarter of what is free on a GPU (the consumers of two banks are still to
    come, and what runs needs room), `ROOM` elsewhere.
    """
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else ROOM


def _put_back(block: nn.Module, own: Any) -> None:
    if own is None:
        del block.forward
    else:
        block.forward = own


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in an output, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def _equal(one: Any, other: Any) -> bool:
    """Whether two calls' arguments are the same, however nested."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)
