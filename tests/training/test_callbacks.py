"""What a rank hands over, and what the clock of an epoch counts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cifar_dist.config.train import TrainConfig
from cifar_dist.model.classifier import Classifier
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.training.callbacks import Record
from cifar_dist.training.writer import BackgroundWriter
from tests.training.small import Small, TrainFew, small_network

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def record(folder: Path) -> Record:
    run, config = RunDirectory.at(str(folder), "run"), TrainConfig()
    return Record(run, config, {}, lambda row: None, BackgroundWriter())


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_rank_hands_over_copies_that_are_on_the_cpu(tmp_path: Path, device: str) -> None:
    module = Classifier(Small(), TrainConfig(), 7).to(device)
    module.totals_of("train").images.fill_(24)
    module.network.bn1.running_mean.fill_(0.5)
    state = record(tmp_path).rank_state(module)
    found = list(tensors_in(state))
    assert {each.device.type for each in found} == {"cpu"}
    live = {each.untyped_storage().data_ptr() for each in module.buffers()}
    assert not live & {each.untyped_storage().data_ptr() for each in found}
    module.totals_of("train").reset()
    module.network.bn1.running_mean.zero_()
    assert state["totals"]["images"] == 24
    assert state["statistics"]["network.bn1.running_mean"].tolist() == [0.5] * 8
    assert state["totals"].keys() == module.totals_of("train").state().keys()


def test_the_clock_is_read_once_the_gpu_has_done_the_last_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The nearest that a machine without a GPU comes to steps that are still queued.
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(0.05))
    clock = record(tmp_path)
    began = time.perf_counter()
    module: Any = SimpleNamespace(device=torch.device("cuda"))
    clock.on_validation_start(SimpleNamespace(), module)
    assert clock._trained - began >= 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_a_second_count_what_the_gpu_has_yet_to_do(
    train_few: TrainFew, tmp_path: Path
) -> None:
    class Slow(Small):
        def disturbed(self, hidden: Tensor) -> Tensor:
            if self.training:
                torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s of a GPU, queued in no time
            return hidden

    with small_network(Slow):
        trained = train_few(tmp_path, "slow", use_gpu=True, max_epochs=2)
    last = trained.outcome.history[-1]
    assert 144 / last["images_per_second"] > 6 * 0.05
