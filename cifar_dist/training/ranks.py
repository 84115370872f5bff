"""State that differs between ranks, and gathering it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


def running_statistics(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the running means and variances of batch normalisation, by name."""
    return [
        (name, buffer)
        for name, buffer in module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    ]


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors of one type to the CPU in one transfer: each would wait for the device."""
    if not tensors:
        return {}
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()]).cpu()
    parts = torch.split(flat, [tensor.numel() for tensor in tensors.values()])
    return {
        # Cloned: gathering pickles a view with the whole tensor that it is a part of, once for each
        # name.
        name: part.view(tensor.shape).clone()
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }


def gathered(mine: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    """Return every rank's, in the order of ranks, on rank 0; elsewhere only this rank's.

    A collective. Tensors must be on the CPU: pickled, a tensor of a GPU would be put on the GPU of
    that number in the process that gathers, which may have none of it.
    """
    if world_size == 1:
        return [mine]
    # gather_object takes the list on the rank that gathers alone, and refuses one elsewhere.
    every: list[Any] | None = [None] * world_size if torch.distributed.get_rank() == 0 else None
    torch.distributed.gather_object(mine, every)
    return every or [mine]
