"""What ResNet-18 learns step by step, against losses that were written down once.

A change for speed must not change what is computed, but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cifar_dist.events import Event, StepDone
from tests.training.small import TrainFew

GOLDEN = {
    "adamw": [2.2480023, 2.6432588, 2.6568868, 2.4976144, 2.1577532, 2.3336556],
    "sgd": [2.2480023, 2.6503501, 2.7896218, 2.5439973, 2.3098564, 2.4681022],
}
"""By optimizer: rank 0's losses after each step, at seed 0, taken with torch 2.15 on an x86 CPU
when NumPy's Philox came to draw the order and the augmentation. With the draws of version 0.1.0
the same code gave the losses that 0.1.0 had, to a millionth."""


@pytest.fixture
def _two_threads() -> Iterator[None]:
    """As many as the losses were taken with: their number decides how convolutions round."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
@pytest.mark.parametrize("optimizer", GOLDEN)
def test_losses_are_what_they_were(
    train_few: TrainFew, tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cifar_dist.training.callbacks.SECONDS_BETWEEN_STEP_EVENTS", 0)
    losses: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            losses.append(event.loss)

    # So strong a decay that leaving it out would show; small steps, so that rounding does not grow.
    train_few(
        tmp_path, "golden", listen, optimizer=optimizer, max_epochs=1, lr=1e-4, weight_decay=10.0
    )
    assert losses == pytest.approx(GOLDEN[optimizer], rel=1e-4)
