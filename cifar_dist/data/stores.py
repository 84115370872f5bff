"""A worker's images, in the node's memory or in its GPU's.

Both give the same pixels. Images in a GPU's memory cost a step nothing but an index; the others
are gathered by the CPU and sent while the previous batch is trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_dist.errors import UserError

SHARE_OF_FREE_MEMORY = 4
"""``auto`` keeps a data set on the GPU where it takes at most one in this many free bytes: the
network's activations need the rest, and two workers may share the GPU."""


Part = tuple[NDArray[np.int64], Tensor]
"""``[n]`` numbers of a batch's images, and the same as part of a table on the device."""


class ImageStore(Protocol):
    """Images of one source, from which batches are made on a device."""

    device: torch.device

    def batches(self, parts: Iterable[Part]) -> Iterator[Tensor]:
        """Yield the ``[n, C, H, W]`` bytes of each part's images, on the device."""
        ...


class DeviceImages:
    """Images that are all in a device's memory."""

    def __init__(self, images: NDArray[np.uint8], device: torch.device) -> None:
        self.device = device
        self.images = torch.from_numpy(images).to(device)

    def batches(self, parts: Iterable[Part]) -> Iterator[Tensor]:
        for _, numbers in parts:
            # By numbers that are on the device: a mask or a Python list would make a GPU wait.
            yield self.images.index_select(0, numbers)


class HostImages:
    """Images that are mapped from a file on the node."""

    def __init__(self, images: NDArray[np.uint8], device: torch.device) -> None:
        self.device = device
        self.images = images

    def batches(self, parts: Iterable[Part]) -> Iterator[Tensor]:
        if self.device.type == "cuda":
            yield from self._sent_ahead(parts)
            return
        for numbers, _ in parts:
            yield torch.from_numpy(self.images.take(numbers, axis=0))

    def _sent_ahead(self, parts: Iterable[Part]) -> Iterator[Tensor]:
        """Send a batch while the previous one is trained on, in a stream of its own."""
        stream = torch.cuda.Stream(self.device)
        before: tuple[Tensor, torch.cuda.Event] | None = None
        for numbers, _ in parts:
            # torch hands out a pinned buffer again only when the copy that reads it is over.
            shape = (len(numbers), *self.images.shape[1:])
            pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
            # With mode="raise" NumPy would fill a buffer of its own first.
            self.images.take(numbers, axis=0, out=pinned.numpy(), mode="clip")
            with torch.cuda.stream(stream):
                under_way = pinned.to(self.device, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(stream)
            if before is not None:
                yield self._arrived(*before)
            before = under_way, arrived
        if before is not None:
            yield self._arrived(*before)

    def _arrived(self, images: Tensor, arrived: torch.cuda.Event) -> Tensor:
        """Have the device, not this process, wait for images that are under way."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        images.record_stream(current)  # else its memory is free for the next copy too soon
        return images


def make_store(
    images: NDArray[np.uint8], device: torch.device, where: Literal["auto", "on", "off"]
) -> ImageStore:
    """Put images where ``--data-on-device`` says.

    Args:
        images: ``[n, C, H, W]``, mapped.
        device: the worker's.
        where: ``auto`` for the device's memory if it is a GPU with room to spare.

    Raises:
        UserError: ``on``, and they do not fit.
    """
    if device.type != "cuda" or where == "off":
        return HostImages(images, device)
    # Free at this moment, not in total: other workers or trials may have the rest.
    free, _ = torch.cuda.mem_get_info(device)
    if where == "on" and images.nbytes > free:
        raise UserError(
            f"--data-on-device on: the images take {images.nbytes / 2**20:,.0f} MiB, and the GPU "
            f"has {free / 2**20:,.0f} MiB free; choose auto or off"
        )
    if where == "on" or images.nbytes * SHARE_OF_FREE_MEMORY <= free:
        return DeviceImages(images, device)
    return HostImages(images, device)


def to_device(columns: NDArray[np.int64], device: torch.device) -> Tensor:
    """Send an array to a device in one transfer that nothing waits for."""
    tensor = torch.from_numpy(columns)
    if device.type != "cuda":
        return tensor
    # From pageable memory the copy would wait for all work that the device was given before.
    return tensor.pin_memory().to(device, non_blocking=True)
