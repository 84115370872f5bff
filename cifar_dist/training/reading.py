"""Reading a device's numbers without making it wait, or waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


class Reading:
    """Numbers on their way from the device; nothing waits for them before they are asked for.

    Args:
        numbers: a tensor that nothing changes any more.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers.detach()
        self._event: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            # Pinned: a copy to pageable memory would wait until the device has done all before it.
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            # After the copy and in its stream, so that the event stands for numbers that have
            # arrived.
            self._event.record()

    @property
    def arrived(self) -> bool:
        """Whether `values` would return at once."""
        return self._event is None or self._event.query()

    def values(self) -> list[float]:
        """Return the numbers; waits for those that have not arrived."""
        if self._event is not None:
            self._event.synchronize()
        return [float(each) for each in self._numbers.reshape(-1).tolist()]
