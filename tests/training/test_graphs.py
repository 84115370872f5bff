"""Passes that are replayed from CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.training.fit import _replays_graphs
from cifar_dist.training.graphs import replay_full_batches
from tests.training.small import Small, TrainFew, same, small_network


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--cuda-graphs on: needs --use-gpu; omit it"),
        ({"use_gpu": True, "compile": True}, "contradicts --compile"),
        ({"use_gpu": True, "sync_batchnorm": True}, "contradicts --sync-batchnorm"),
    ],
)
def test_what_cannot_be_captured_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(cuda_graphs="on", **settings)


@pytest.mark.parametrize(
    ("settings", "distributed", "expected"),
    [
        ({"use_gpu": True}, False, True),
        ({"use_gpu": True}, True, False),
        ({"use_gpu": True, "compile": True}, False, False),
        ({"use_gpu": True, "sync_batchnorm": True}, False, False),
        ({}, False, False),
    ],
)
def test_by_itself_it_is_used_where_it_can_be(
    settings: dict[str, Any], distributed: bool, expected: bool
) -> None:
    config = TrainConfig(cuda_graphs="auto", **settings)
    assert _replays_graphs(config, distributed) is expected
    assert not _replays_graphs(config.replace(cuda_graphs="off"), distributed)


def test_only_full_training_batches_are_replayed() -> None:
    network, replayed = Small(), []

    def graphed(images: torch.Tensor) -> torch.Tensor:
        replayed.append(len(images))
        return torch.zeros(len(images), 10)

    full, last = torch.randn(8, 3, 32, 32), torch.randn(5, 3, 32, 32)
    replay_full_batches(network, graphed, full.shape)
    assert network(full).abs().sum() == 0
    assert network(last).abs().sum() > 0
    assert network.eval()(full).abs().sum() > 0
    with torch.no_grad():
        assert network.train()(full).abs().sum() > 0
    assert replayed == [8]
    assert "forward" in vars(network)
    assert list(network.state_dict()) == list(Small().state_dict())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGpu:
    @pytest.mark.parametrize(
        "settings",
        [{}, {"precision": "bf16-mixed", "channels_last": True}, {"precision": "16-mixed"}],
        ids=["float32", "bf16", "fp16"],
    )
    def test_replayed_passes_give_the_same_bits(
        self, train_few: TrainFew, tmp_path: Path, settings: dict[str, Any]
    ) -> None:
        # 144 images in batches of 32: each epoch ends with a smaller one.
        shared = {"use_gpu": True, "batch_size": 32, "ema": 0.9, **settings}
        plain = train_few(tmp_path, "plain", **shared)
        graphed = train_few(tmp_path, "graphed", cuda_graphs="on", **shared)
        same(graphed, plain)

    def test_dropout_draws_the_same_numbers(self, train_few: TrainFew, tmp_path: Path) -> None:
        class Dropping(Small):
            def disturbed(self, hidden: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.dropout(hidden, 0.2, self.training)

        with small_network(Dropping):
            plain = train_few(tmp_path, "plain", use_gpu=True)
            graphed = train_few(tmp_path, "graphed", use_gpu=True, cuda_graphs="on")
        same(graphed, plain)

    def test_a_network_that_reads_from_the_device_is_refused(
        self, train_few: TrainFew, tmp_path: Path
    ) -> None:
        class Reading(Small):
            def disturbed(self, hidden: torch.Tensor) -> torch.Tensor:
                return hidden * float(hidden.mean() > -1e9)

        with small_network(Reading), pytest.raises(UserError, match="cannot be captured"):
            train_few(tmp_path, "reading", use_gpu=True, cuda_graphs="on")
        # The process is of use afterwards.
        torch.cuda.manual_seed(5)
        first = torch.rand(2, device="cuda").tolist()
        torch.cuda.manual_seed(5)
        assert torch.rand(2, device="cuda").tolist() == first
