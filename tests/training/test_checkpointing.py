"""What a rank gives to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cifar_dist.config.train import TrainConfig
from cifar_dist.events import always_continue
from cifar_dist.model.classifier import Classifier
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.training.checkpointing import RunCheckpointer
from cifar_dist.training.history import MetricsHistory
from cifar_dist.training.writer import BackgroundWriter
from tests.training.small import Small

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def checkpointer(folder: Path) -> RunCheckpointer:
    run, config = RunDirectory.at(str(folder), "run"), TrainConfig()
    history = MetricsHistory(run, config, lambda row: None)
    return RunCheckpointer(run, config, {}, history, BackgroundWriter(), always_continue)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_a_rank_gives_copies_that_are_on_the_cpu(tmp_path: Path, device: str) -> None:
    module = Classifier(Small(), TrainConfig(), 7).to(device)
    module.totals_of("train").images.fill_(24)
    module.network.bn1.running_mean.fill_(0.5)
    state = checkpointer(tmp_path).rank_state(module)
    found = list(tensors_in(state))
    assert {each.device.type for each in found} == {"cpu"}
    live = {each.untyped_storage().data_ptr() for each in module.buffers()}
    assert not live & {each.untyped_storage().data_ptr() for each in found}
    module.totals_of("train").reset()
    module.network.bn1.running_mean.zero_()
    assert state["totals"]["images"] == 24
    assert state["statistics"]["network.bn1.running_mean"].tolist() == [0.5] * 8
    assert state["totals"].keys() == module.totals_of("train").state().keys()
