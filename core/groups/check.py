"""The slice == mask check: removing units physically must equal zeroing their columns at the consumer's input.

Both sides are built here in the plainest way, apart from the run time that users see, so that the run time can be
tested against them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..eager import eager
from ..errors import GroupError
from ..host import InputSize
from .group import Group, consumer_sites, kept_columns, width_groups
from .layer import inputs_of, layer_at
from .passing import passed, places_of
from .registry import family_of, find_groups


@dataclass(frozen=True)
class GroupCheck:
    """Result for one group: the largest difference between the two outputs, relative to the output's largest value."""

    group: str
    kept: int
    size: int
    error: float


def check_slice_equals_mask(
    denoiser: nn.Module,
    groups: Sequence[Group] | None = None,
    inputs: dict[str, Any] | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
    size: InputSize | None = None,
) -> list[GroupCheck]:
    """Check every group of `denoiser` with a random half of its units kept; the weights are left as they were.

    Args:
        denoiser: the dense denoiser, in float32 or float64.
        groups: groups to check; all that the family finds by default.
        inputs: keyword arguments of a forward; the family's example by default.
        seed: of the choice of units.
        tolerance: largest relative difference that passes.
        size: of the family's example; a small one is as good, and faster.

    Raises:
        GroupError: a group differs by more, naming it and the difference.
    """
    groups = find_groups(denoiser) if groups is None else groups
    if inputs is None:
        inputs = family_of(denoiser).example_inputs(denoiser, batch=2, seed=seed, size=size)
    generator = torch.Generator().manual_seed(seed)
    results = []
    for group in groups:
        keep = torch.randperm(group.size, generator=generator)[: max(1, (group.size + 1) // 2)]
        with torch.no_grad(), eager(), masked(denoiser, groups, {group.name: keep}):
            expected = _output(denoiser, inputs)
        with torch.no_grad(), eager(), sliced(denoiser, groups, {group.name: keep}):
            got = _output(denoiser, inputs)
        error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
        if not error <= tolerance:
            raise GroupError(
                f"group `{group.name}`: slicing and masking differ by {error:.2e} (allowed {tolerance:.0e}). Its "
                "family misses a module or an attribute that depends on the number of units."
            )
        results.append(GroupCheck(group.name, len(keep), group.size, error))
    return results


@contextmanager
def masked(denoiser: nn.Module, groups: Sequence[Group], keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Dense run in which the channels of all units but `keep` are zeroed at each consumer's input.

    A masked block has its consumers' outputs zeroed, which leaves the residual stream as it was.
    """
    with ExitStack() as stack:
        for path, entries in consumer_sites(width_groups(groups)).items():
            layer = layer_at(denoiser, path)
            mask = torch.ones(inputs_of(layer), device=layer.weight.device, dtype=layer.weight.dtype)
            for group, offset in entries:
                if group.name in keep:
                    mask[offset : offset + group.channels] = 0
                    mask[group.columns(keep[group.name].to(mask.device), offset)] = 1
            mask = mask[:, None, None] if isinstance(layer, nn.Conv2d) else mask  # where the input's channels are
            stack.callback(layer.register_forward_pre_hook(lambda _, args, m=mask: (args[0] * m,)).remove)
        for path, _ in _skipped_blocks(groups, keep):
            for name in consumer_sites(width_groups(groups)):
                if name.startswith(f"{path}."):
                    hook = layer_at(denoiser, name).register_forward_hook(lambda _, __, out: torch.zeros_like(out))
                    stack.callback(hook.remove)
        yield


@contextmanager
def sliced(denoiser: nn.Module, groups: Sequence[Group], keep: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with only the units `keep` physically present; parameters and attributes are put back at the end."""
    chosen = [group for group in width_groups(groups) if group.name in keep]
    with ExitStack() as stack:
        for group in chosen:
            units = keep[group.name]
            for producer in group.producers:
                rows = group.rows(units, producer.blocks)
                _replace(stack, layer_at(denoiser, producer.path), rows=rows)
            for companion in group.companions:
                _replace(stack, denoiser.get_submodule(companion), rows=group.columns(units))
            for attribute in group.attributes:
                module = denoiser.get_submodule(attribute.path)
                stack.callback(setattr, module, attribute.name, getattr(module, attribute.name))
                setattr(module, attribute.name, attribute.per_unit * len(units))
        for path, entries in consumer_sites(width_groups(groups)).items():
            if any(group.name in keep for group, _ in entries):
                units_of = {g.name: keep.get(g.name, torch.arange(g.size)) for g, _ in entries}
                _replace(stack, layer_at(denoiser, path), columns=kept_columns(entries, units_of))
        for path, passes in _skipped_blocks(groups, keep):
            block = denoiser.get_submodule(path)
            stack.callback(block.__dict__.pop, "forward")
            places = places_of(block.forward, passes)
            block.forward = lambda *args, places=places, **kwargs: passed(places, args, kwargs)
        yield


def _skipped_blocks(groups: Sequence[Group], keep: Mapping[str, Tensor]) -> list[tuple[str, tuple[str, ...]]]:
    """Path of each block that is not kept, and what it passes through."""
    return [
        (path, group.passes)
        for group in groups
        if group.kind == "block" and group.name in keep
        for index, path in enumerate(group.blocks)
        if index not in keep[group.name].tolist()
    ]


def _replace(stack: ExitStack, module: nn.Module, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Replace the module's parameters by slices until the stack closes."""
    for name, old in list(module.named_parameters(recurse=False)):
        if columns is not None and name == "bias":
            continue
        kept = old.detach()
        kept = kept[rows.to(old.device)] if rows is not None else kept
        kept = kept[:, columns.to(old.device)] if columns is not None else kept
        setattr(module, name, nn.Parameter(kept, requires_grad=False))
        stack.callback(setattr, module, name, old)


def _output(denoiser: nn.Module, inputs: dict[str, Any]) -> Tensor:
    result = denoiser(**inputs, return_dict=False)
    output: Tensor = result[0]
    return output
