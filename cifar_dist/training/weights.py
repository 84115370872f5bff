"""A network's weights as the bytes of a file."""

from __future__ import annotations

from collections.abc import Mapping

import safetensors.torch
from torch import Tensor, nn


def weights_as_bytes(network: nn.Module) -> bytes:
    """Return a network's weights and statistics as the bytes of a safetensors file.

    The same weights give the same bytes, so equal SHA-256 digests mean equal weights.
    """
    return network_as_bytes(network.state_dict())


def network_as_bytes(state: Mapping[str, Tensor], prefix: str = "") -> bytes:
    """Return the same of the network whose names begin so in a checkpoint's ``state_dict``."""
    return safetensors.torch.save(
        {
            # safetensors refuses other strides, such as those of channels_last weights.
            name.removeprefix(prefix): value.detach().cpu().contiguous()
            for name, value in state.items()
            if name.startswith(prefix)
        }
    )
