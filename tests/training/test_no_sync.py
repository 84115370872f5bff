"""No training step waits for the GPU."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.waits import WaitsInSteps, callback_added
from tests.training.small import STEPS, Small, TrainFew, small_network

PRESET = {
    "stem": "cifar", "optimizer": "sgd", "schedule": "onecycle", "lr": 0.2, "cutout": 8,
    "label_smoothing": 0.1, "precision": "bf16-mixed", "channels_last": True, "flip": 0.5,
    "ema": 0.99, "crop_padding_mode": "reflect", "decay_norm_bias": False, "anneal": "linear",
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "settings", [{}, PRESET, {"data_on_device": "off"}], ids=["defaults", "preset", "data sent"]
)
def test_no_step_of_an_epoch_waits_for_the_gpu(
    train_few: TrainFew, tmp_path: Path, settings: dict[str, Any]
) -> None:
    for mode in ("warn", "error"):  # the first names all places, the second raises at one
        watch = WaitsInSteps(mode)
        with callback_added(watch):
            train_few(tmp_path, mode, use_gpu=True, max_epochs=2, **settings)
        assert watch.steps == 2 * STEPS
        assert dict(watch.places) == {}


class Waiting(Small):
    """Says in each forward pass what torch says where the device is waited for."""

    def disturbed(self, hidden: torch.Tensor) -> torch.Tensor:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return hidden


def test_waits_in_steps_are_counted_by_place_and_those_outside_are_not(
    train_few: TrainFew, tmp_path: Path
) -> None:
    modes: list[str] = []
    watch = WaitsInSteps("warn", modes.append)
    with small_network(Waiting), callback_added(watch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_few(tmp_path, "waiting", max_epochs=2)
    line = inspect.getsourcelines(Waiting.disturbed)[1] + 1
    # Validation and test pass there too.
    assert dict(watch.places) == {f"tests/training/test_no_sync.py:{line}": 2 * STEPS}
    assert watch.steps == 2 * STEPS
    assert modes == ["warn", "default"] * 2


def test_a_run_that_breaks_off_in_a_step_is_watched_no_more(
    train_few: TrainFew, tmp_path: Path
) -> None:
    class Raising(Small):
        def disturbed(self, hidden: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("in the first step")

    modes: list[str] = []
    with (
        small_network(Raising),
        callback_added(WaitsInSteps("error", modes.append)),
        pytest.raises(Exception, match="in the first step"),
    ):
        train_few(tmp_path, "raising")
    assert modes == ["error", "default"]
