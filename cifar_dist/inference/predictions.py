"""What a classifier answered to a split's images, kept with the run: numbers, no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

MISTAKES_KEPT = 24
"""Wrongly answered images that are kept as pictures: those with the highest confidence."""


@dataclass(frozen=True)
class Predictions:
    """A classifier's logits for every image of a split, in the split's order."""

    split: Literal["test", "val"]
    epoch: int
    """1-based: the epoch whose weights answered."""
    classes: tuple[str, ...]
    logits: NDArray[np.float32]
    """``[n, classes]``"""
    labels: NDArray[np.integer[Any]]
    """``[n]`` numbers of classes, of a type that holds them all."""
    mistakes: NDArray[np.int64]
    """Positions in the split of the wrong answers that are kept as pictures, the surest first."""
    pictures: NDArray[np.uint8]
    """``[mistakes, 3, H, W]``"""

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
        """The answers, with the pictures of the surest mistakes picked out.

        Args:
            images: ``[all, 3, H, W]``, of which only those pictures are touched.
            members: ``[n]`` which of them are the split's.
        """
        answers = logits.argmax(axis=1)
        wrong = np.flatnonzero(answers != labels)
        sure = confidences(logits[wrong])
        mistakes = wrong[np.argsort(-sure, kind="stable")][:MISTAKES_KEPT]
        pictures = np.ascontiguousarray(images[members[mistakes]])
        return cls(split, epoch, classes, logits, labels, mistakes, pictures)

    @property
    def answers(self) -> NDArray[np.int64]:
        """``[n]`` numbers of the classes that were answered."""
        found: NDArray[np.int64] = self.logits.argmax(axis=1)
        return found

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        from safetensors.numpy import save

        about = {"split": self.split, "epoch": self.epoch, "classes": self.classes}
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        return save(arrays, metadata={"about": json.dumps(about)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Predictions:
        """What `to_bytes` made.

        Raises:
            ValueError: it is something else, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(content)
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
            raise ValueError(f"holds no answers ({error})") from None


_ARRAYS = ("logits", "labels", "mistakes", "pictures")


def confidences(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """``[n]`` softmax probabilities of the answers to ``[n, classes]`` logits."""
    values = logits.astype(np.float64)
    odds = np.exp(values - values.max(axis=1, keepdims=True, initial=-np.inf))
    found: NDArray[np.float64] = 1 / odds.sum(axis=1)
    return found
