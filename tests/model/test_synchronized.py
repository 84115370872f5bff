"""Two ranks against one process with the whole batch: up to rounding, and to the bit."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cifar_dist.data.order import rank_slice
from cifar_dist.model.resnet import resnet18
from cifar_dist.model.synchronized import GlobalBatchNorm2d, synchronize

PARTS = (3, 4)  # images of rank 0 and of rank 1
CHANNELS, SIDE, STEPS = 5, 6, 2


class Case(NamedTuple):
    """A way to normalise, under its name."""

    name: str
    dtype: torch.dtype = torch.float32
    momentum: float | None = 0.1
    offset: float = 3.0
    """Mean of the images in standard deviations: what float32 squares would drown in."""
    autocast: bool = False
    channels_last: bool = False
    plain: bool = False
    """Not synchronised, to see that it matters."""
    side: int = SIDE


CASES = (
    Case("float32"),
    Case("float64", dtype=torch.float64),
    Case("channels-last", channels_last=True),
    Case("far-from-zero", offset=1e3),
    Case("cumulative-momentum", momentum=None),
    Case("no-momentum", momentum=0.0),
    Case("one-pixel", side=1),
    Case("bf16", autocast=True),
    Case("bf16-channels-last", autocast=True, channels_last=True),
    Case("plain", plain=True),
)
ONE_IMAGE = Case("one-image", side=1)
ONE_IMAGE_PARTS = (1, 6)  # rank 0 has a single value a channel


def network(case: Case) -> nn.Sequential:
    """Batch normalisation whose parameters are not the initial ones."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.BatchNorm2d(CHANNELS, momentum=case.momentum)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(CHANNELS, generator=generator))
    # ReLU in place, as in ResNet: it may not spoil what the backward pass needs.
    return nn.Sequential(layer, nn.ReLU(inplace=True)).to(case.dtype)


def batches(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Global batches of images and what comes back to their outputs."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(STEPS):
        shape = (sum(PARTS), CHANNELS, case.side, case.side)
        images, weights = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)
        )
        # Parts of different means: averaging two ranks' variances would be visibly wrong.
        images[: PARTS[0]] += 1
        made.append(((images + case.offset).to(case.dtype), weights.to(case.dtype)))
    return made


def train(case: Case, layer: nn.Module, part: slice) -> dict[str, Tensor]:
    """Train on a part of each batch: outputs and gradients of the last, sums and statistics."""
    layer.zero_grad()
    memory = torch.channels_last if case.channels_last else torch.contiguous_format
    for images, weights in batches(case):
        mine = images[part].clone(memory_format=memory).requires_grad_()
        # A convolution under autocast hands on bfloat16.
        entered = mine.bfloat16() if case.autocast else mine
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            output = layer(entered)
        assert output.is_contiguous(memory_format=memory)
        assert output.dtype == entered.dtype
        (output.to(case.dtype) * weights[part]).sum().backward()
    result = {"output": output.detach(), "gradient": mine.grad}
    result |= {name: p.grad for name, p in layer.named_parameters()}
    result |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return {name: value for name, value in result.items() if value is not None}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=1)
    )
    results = {}
    for case in (*CASES, ONE_IMAGE):
        layer: nn.Module = network(case)
        if not case.plain:
            layer = synchronize(layer)
        first = (ONE_IMAGE_PARTS if case == ONE_IMAGE else PARTS)[0]
        results[case.name] = train(case, layer, slice(first, None) if rank else slice(first))
    results["network"] = train_network(rank, 2, synchronized=True)
    results["plain network"] = train_network(rank, 2, synchronized=False)
    # In evaluation no rank waits for another: only rank 0 has images here.
    if rank == 0:
        case = CASES[0]
        plain = network(case).eval()
        layer = synchronize(copy.deepcopy(plain))
        images = batches(case)[0][0]
        results["evaluation"] = {"output": layer(images), "expected": plain(images)}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two ranks saw, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def assert_like_one_process(case: Case, ranks, **tolerance: float) -> None:
    expected = train(case, network(case), slice(None))
    first, second = (rank[case.name] for rank in ranks)
    assert first.keys() == second.keys() == expected.keys()
    for name, value in expected.items():
        if name in ("output", "gradient"):
            found = torch.cat([first[name], second[name]])
        elif "running" in name or "tracked" in name:
            assert torch.equal(first[name], second[name])
            found = first[name]
        else:
            found = first[name] + second[name]
        torch.testing.assert_close(
            found, value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


TOLERANCES = {
    # Here nn.BatchNorm2d itself adds up in float32, image after image.
    "channels-last": {"rtol": 1e-5, "atol": 1e-5},
    "float64": {"rtol": 1e-10, "atol": 1e-10},
    # Of 1000 standard deviations' offset float32 leaves 6e-5 in the images' mean.
    "far-from-zero": {"rtol": 1e-3, "atol": 1e-3},
    # bfloat16 has 8 bits: an output may round the other way.
    "bf16": {"rtol": 8e-3, "atol": 8e-3},
    "bf16-channels-last": {"rtol": 8e-3, "atol": 8e-3},
}
TIGHT = {"rtol": 2e-6, "atol": 2e-6}


@pytest.mark.parametrize("case", [c for c in CASES if not c.plain], ids=lambda case: case.name)
def test_two_ranks_are_one_process_with_the_whole_batch(ranks, case: Case) -> None:
    assert_like_one_process(case, ranks, **TOLERANCES.get(case.name, TIGHT))


def test_a_rank_may_have_a_single_value_a_channel(ranks) -> None:
    assert_like_one_process(ONE_IMAGE, ranks, **TIGHT)


def test_without_synchronising_two_ranks_are_not_one_process(ranks) -> None:
    with pytest.raises(AssertionError, match="output"):
        assert_like_one_process(CASES[-1], ranks, rtol=0.1, atol=0.1)


def test_evaluation_needs_no_other_rank_and_gives_the_same_bits(ranks) -> None:
    found = ranks[0]["evaluation"]
    assert torch.equal(found["output"], found["expected"])


@pytest.mark.parametrize("case", [c for c in CASES if not c.plain], ids=lambda case: case.name)
def test_alone_it_is_batch_norm(case: Case) -> None:
    expected = train(case, network(case), slice(None))
    found = train(case, synchronize(network(case)), slice(None))
    assert found.keys() == expected.keys()
    tolerance = TOLERANCES.get(case.name, TIGHT)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance)


def train_network(rank: int, world_size: int, synchronized: bool) -> dict[str, Tensor]:
    """A few steps of AdamW with even batches and an odd one: weights and statistics."""
    torch.manual_seed(0)
    layers: nn.Module = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    if synchronized:
        synchronize(layers)
    model = layers
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(layers, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(layers.parameters(), 1e-2)
    for size in (32, 32, 32, 27, 32, 32):
        mine = rank_slice(size, rank, world_size)
        images, labels = torch.randn(size, 3, 12, 12), torch.randint(10, (size,))
        loss = F.cross_entropy(model(images[mine]), labels[mine], reduction="sum")
        (loss * (world_size / size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return layers.state_dict()


def test_one_rank_and_two_give_the_same_bits(ranks) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = train_network(0, 1, synchronized=True)
    finally:
        torch.set_num_threads(threads)
    for rank in ranks:
        for name, value in alone.items():
            assert torch.equal(rank["network"][name], value), name
    # It would not be so by itself.
    assert any(not torch.equal(ranks[0]["plain network"][name], alone[name]) for name in alone)


def test_a_network_keeps_its_weights_and_their_names() -> None:
    plain = resnet18(10)
    before = dict(plain.state_dict(keep_vars=True))
    layers = [name for name, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)]
    plain.bn1.eval()
    network = synchronize(plain)
    after = dict(network.state_dict(keep_vars=True))
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert len(layers) == 20
    made = dict(network.named_modules())
    assert {type(made[name]) for name in layers} == {GlobalBatchNorm2d}
    assert not network.bn1.training
    assert network.layer1[0].bn1.training


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="4D"):
        GlobalBatchNorm2d(3)(torch.zeros(2, 3))
