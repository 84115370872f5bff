"""A classifier's predictions for a split's images, kept with the run; loads no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cifar_dist.data.cache import CachedDataset

MISTAKES_KEPT = 24
"""Misclassified images that are kept as pictures: those with the highest confidence."""


@dataclass(frozen=True)
class Predictions:
    """A classifier's logits for every image of a split, in the split's order."""

    split: Literal["test", "val"]
    epoch: int
    """1-based: the epoch whose weights they are of."""
    classes: tuple[str, ...]
    logits: NDArray[np.float32]
    """``[n, classes]``"""
    labels: NDArray[np.integer[Any]]
    """``[n]`` numbers of classes, of a type that holds them all."""
    mistakes: NDArray[np.int64]
    """Positions in the split of the misclassified images that are kept as pictures, the most
    confident first."""
    pictures: NDArray[np.uint8]
    """``[mistakes, 3, H, W]``"""

    @classmethod
    def of_split(
        cls,
        dataset: CachedDataset,
        split: Literal["test", "val"],
        epoch: int,
        logits: NDArray[np.float32],
    ) -> Predictions:
        """Make the predictions for a split of a data set from their logits."""
        images, members = dataset.part(split)
        labels = np.asarray(images.labels[members])
        return cls.of(split, epoch, dataset.classes, logits, labels, images.images, members)

    @classmethod
    def of(
        cls,
        split: Literal["test", "val"],
        epoch: int,
        classes: tuple[str, ...],
        logits: NDArray[np.float32],
        labels: NDArray[np.integer[Any]],
        images: NDArray[np.uint8],
        members: NDArray[np.int64],
    ) -> Predictions:
        """Make predictions, with the pictures of the most confident mistakes.

        Args:
            images: ``[all, 3, H, W]``, of which only those pictures are read.
            members: ``[n]`` which of them are the split's.
        """
        wrong = np.flatnonzero(logits.argmax(axis=1) != labels)
        confident = confidences(logits[wrong])
        # A stable sort: among equal confidences a rerun keeps the same pictures.
        mistakes = wrong[np.argsort(-confident, kind="stable")][:MISTAKES_KEPT]
        pictures = np.ascontiguousarray(images[members[mistakes]])
        return cls(split, epoch, classes, logits, labels, mistakes, pictures)

    @property
    def predicted(self) -> NDArray[np.int64]:
        """``[n]`` numbers of the predicted classes."""
        found: NDArray[np.int64] = self.logits.argmax(axis=1)
        return found

    @property
    def correct(self) -> int:
        """Number of images that were classified correctly."""
        return int((self.predicted == self.labels).sum())

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file."""
        from safetensors.numpy import save

        about = {"split": self.split, "epoch": self.epoch, "classes": self.classes}
        # safetensors writes memory as it lies: a transposed view would be read back with its values
        # in other places.
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        return save(arrays, metadata={"about": json.dumps(about)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Predictions:
        """Read what `to_bytes` returned.

        Raises:
            ValueError: it is something else, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(content)
            # Read from the header by hand: ``load`` returns arrays without the metadata.
            size = int.from_bytes(content[:8], "little")
            about: dict[str, Any] = json.loads(
                json.loads(content[8 : 8 + size])["__metadata__"]["about"]
            )
            return cls(
                about["split"],
                int(about["epoch"]),
                tuple(about["classes"]),
                **{name: arrays[name] for name in _ARRAYS},
            )
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"holds no predictions ({error})") from None


_ARRAYS = ("logits", "labels", "mistakes", "pictures")


def confidences(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return ``[n]`` softmax probabilities of the classes that ``[n, classes]`` logits predict."""
    # In float32 a confidence above 1 - 3e-8 rounds to 1, and the surest mistakes would be a tie.
    values = logits.astype(np.float64)
    # Less the largest, since exp overflows from 710 on.
    odds = np.exp(values - values.max(axis=1, keepdims=True, initial=-np.inf))
    found: NDArray[np.float64] = 1 / odds.sum(axis=1)
    return found
