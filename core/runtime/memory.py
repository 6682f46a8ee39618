"""What a denoiser holds on its device, measured on the tensors themselves."""

from __future__ import annotations

from torch import nn


def resident_bytes(denoiser: nn.Module, added_only: bool = False) -> int:
    """Bytes of the tensors that a denoiser really holds on its device, each storage counted once.

    Args:
        denoiser: any module.
        added_only: count only what stage pruning added.
    """
    tensors = [*denoiser.named_parameters(), *denoiser.named_buffers()]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for name, tensor in tensors
        if not added_only or name.rpartition(".")[2].startswith("stage_")
    }
    return sum(storages.values())
