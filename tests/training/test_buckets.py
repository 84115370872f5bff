"""DDP's gradient buckets are laid out before the first step, and stay."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cifar_dist.data.datamodule import Batch
from cifar_dist.training.buckets import fix_buckets


@pytest.fixture
def _alone_in_a_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped() -> DistributedDataParallel:
    """A network whose layers are used in another order than they are declared in."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(600, 600) for _ in range(6)] + [nn.BatchNorm1d(600)])

    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            for place in (3, 0, 6, 5, 1, 4, 2):
                values = self.layers[place](values)
            return values

    return DistributedDataParallel(
        Shuffled(), broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=3
    )


def layouts(ddp: DistributedDataParallel, steps: int) -> list[list[tuple[int, ...]]]:
    """The shapes in each bucket, in the order in which buckets are exchanged, by step."""
    seen: list[list[tuple[int, ...]]] = []

    def hook(state, bucket):  # DDP wants annotations that are types, or none
        seen[-1].append(tuple(id(weight) for weight in bucket.parameters()))
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, hook)
    for _ in range(steps):
        seen.append([])
        ddp(torch.randn(4, 600)).sum().backward()
    return seen


@pytest.mark.usefixtures("_alone_in_a_group")
def test_ddp_by_itself_lays_buckets_out_anew_after_its_first_step() -> None:
    first, *later = layouts(wrapped(), 3)
    assert later[0] == later[1] != first  # else there would be nothing to mend


@pytest.mark.usefixtures("_alone_in_a_group")
def test_buckets_are_the_same_at_every_step() -> None:
    ddp = wrapped()
    fix_buckets(ddp)
    first, *later = layouts(ddp, 3)
    assert later == [first, first]
    assert len(first) > 1  # several, so that the exchange overlaps the backward pass


@pytest.mark.usefixtures("_alone_in_a_group")
def test_nothing_else_is_touched() -> None:
    ddp, untouched = wrapped(), wrapped()
    random = torch.get_rng_state()
    fix_buckets(ddp)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(weight.grad is None for weight in ddp.parameters())
    for mine, its in zip(ddp.state_dict().values(), untouched.state_dict().values(), strict=True):
        assert torch.equal(mine, its)
    images = torch.randn(4, 600)
    ddp(images).sum().backward()
    untouched(images).sum().backward()
    for mine, its in zip(ddp.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)


@pytest.mark.usefixtures("_alone_in_a_group")
def test_buckets_are_laid_out_where_ddp_moves_inputs_to_its_device() -> None:
    # As it does for a GPU, and there only.
    ddp = wrapped()
    ddp.device_type, ddp.device_ids = "cpu", [0]
    fix_buckets(ddp)
    first, *later = layouts(ddp, 3)
    assert later == [first, first]


@pytest.mark.usefixtures("_alone_in_a_group")
def test_a_batch_survives_the_move_to_ddp_s_device() -> None:
    batches = []

    class Taking(nn.Linear):
        def forward(self, batch: Batch) -> torch.Tensor:
            batches.append(batch)
            return super().forward(batch.images)

    ddp = DistributedDataParallel(Taking(3, 3))
    ddp.device_type, ddp.device_ids = "cpu", [0]
    for draws in ((), (torch.zeros(3, 2), torch.zeros(0, 2))):  # validation and training
        ddp(Batch(torch.ones(2, 3), torch.zeros(2), 4, draws)).sum().backward()
    validated, trained = batches
    assert (type(trained), trained.global_size, validated.draws) == (Batch, 4, ())
    assert [each.shape for each in trained.draws] == [(3, 2), (0, 2)]
