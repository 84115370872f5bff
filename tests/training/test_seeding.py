"""Seeds and switches."""

import os
import random

import numpy as np
import pytest
import torch

from cifar_dist.training.seeding import set_seed


@pytest.fixture(autouse=True)
def _restored():
    before = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)


def draws() -> tuple:
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_the_same_seed_gives_the_same_draws_from_every_generator() -> None:
    set_seed(3)
    first = draws()
    set_seed(3)
    assert draws() == first
    set_seed(4)
    assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_string_hashes_of_child_processes_are_seeded() -> None:
    set_seed(11)
    assert os.environ["PYTHONHASHSEED"] == "11"


@pytest.mark.parametrize("deterministic", [True, False])
def test_cudnn_is_deterministic_or_free_to_choose(deterministic: bool) -> None:
    set_seed(0, deterministic)
    assert torch.backends.cudnn.deterministic is deterministic
    assert torch.backends.cudnn.benchmark is not deterministic
    assert torch.are_deterministic_algorithms_enabled() is deterministic


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_gpu_is_seeded() -> None:
    set_seed(5)
    first = [torch.rand(1, device=f"cuda:{i}").item() for i in range(torch.cuda.device_count())]
    set_seed(5)
    again = [torch.rand(1, device=f"cuda:{i}").item() for i in range(torch.cuda.device_count())]
    assert first == again
