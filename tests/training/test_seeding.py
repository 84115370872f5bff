"""Seeds and switches."""

import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cifar_dist.events import Event, Warned
from cifar_dist.model import seeding
from cifar_dist.model.seeding import nondeterminism_reported, set_seed
from tests.conftest import PYTHON_PATH
from tests.processes import PATIENCE_S
from tests.training.small import Small, TrainFew, small_network


@pytest.fixture(autouse=True)
def _restored():
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32)
    yield
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = before
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


@pytest.mark.parametrize("tf32", [True, False])
def test_convolutions_use_tf32_or_not(tf32: bool) -> None:
    torch.backends.cudnn.allow_tf32 = not tf32
    set_seed(0, tf32=tf32)
    assert torch.backends.cudnn.allow_tf32 is tf32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_convolutions_in_full_float32_are_nearer_to_float64() -> None:
    images, weights = torch.randn(8, 64, 32, 32), torch.randn(64, 64, 3, 3)
    exact = F.conv2d(images.double(), weights.double())
    errors = {}
    for tf32 in (True, False):
        set_seed(0, tf32=tf32)
        found = F.conv2d(images.cuda(), weights.cuda()).cpu().double()
        errors[tf32] = (found - exact).abs().max().item()
    assert errors[False] * 10 < errors[True]


class Unpooling(Small):
    """A small network with an operation that torch has no deterministic algorithm for."""

    def disturbed(self, hidden: torch.Tensor) -> torch.Tensor:
        highest, places = F.max_pool2d(hidden, 2, return_indices=True)
        return F.max_unpool2d(highest, places, 2)


@pytest.mark.parametrize("verbose", [False, True])
def test_an_operation_that_is_not_deterministic_is_reported_once(
    train_few: TrainFew, tmp_path: Path, verbose: bool
) -> None:
    heard: list[Event] = []
    with small_network(Unpooling), warnings.catch_warnings(record=True) as shown:
        train_few(tmp_path, "undetermined", heard.append, max_epochs=2, verbose=verbose)
    assert not [each for each in shown if "deterministic" in str(each.message)]
    assert [event.message for event in heard if isinstance(event, Warned)] == [
        "max_unpooling2d_forward_out is not deterministic here: a rerun may give other bits"
    ]


def test_where_that_is_no_warning_it_is_an_error(
    train_few: TrainFew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seeding, "WARN_ONLY", False)
    with (
        small_network(Unpooling),
        pytest.raises(RuntimeError, match="does not have a deterministic"),
    ):
        train_few(tmp_path, "undetermined")


def test_other_warnings_stay_what_they_are() -> None:
    heard: list[Event] = []
    with pytest.warns(UserWarning, match="something else"), nondeterminism_reported(heard.append):
        warnings.warn("something else", stacklevel=1)
    assert heard == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_tests_take_it_for_an_error() -> None:
    set_seed(0)
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.histc(torch.rand(9, device="cuda"))


FIRST_TOUCH = """
import os, sys
os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
import torch

class Touched(BaseException):
    pass

def touch(*words, **named):
    print("touched with", os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
    raise Touched

# As on a machine with a GPU, up to the first use of it.
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda._lazy_init = touch
{work}
"""

FIT = """
import lightning.pytorch as pl
from cifar_dist.config import TrainConfig
from cifar_dist.training import fit as fitting
pl.Trainer = touch
from cifar_dist.train import train
train(TrainConfig(data_dir={data!r}, num_workers=0, use_gpu=True, deterministic={deterministic},
                  batch_size=24, storage_path={storage!r}))
"""
EVALUATE = """
from cifar_dist.evaluate import evaluate
from cifar_dist.config.model import EvaluateConfig
evaluate(EvaluateConfig(model={run!r}, use_gpu=True))
"""
EVALUATE_SHARE = """
import dataclasses
from safetensors.torch import save
from cifar_dist.cluster.evaluator import Work, _share
from cifar_dist.model.weights import read_weights
from cifar_dist.config.model import EvaluateConfig
from cifar_dist.inference.lookup import trained_config
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.storage import at
run = RunDirectory(at({run!r}))
config = trained_config(EvaluateConfig(model={run!r}), use_gpu=True, num_workers=2)
weights = save(read_weights(str(run.model_file)))
_share(Work(config, run.started_with_fingerprint(), "weights", weights, "test", 9), 0, 2)
"""
PREDICT = """
from cifar_dist.config.model import PredictConfig
from cifar_dist.predict import predict
next(predict(PredictConfig(model={run!r}, images=("-",), use_gpu=True)))
"""


@pytest.fixture(scope="module")
def few_run(train_few: TrainFew, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(str(train_few(tmp_path_factory.mktemp("runs"), "run", max_epochs=1).run.path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "deterministic"),
    [(FIT, True), (FIT, False), (EVALUATE, True), (EVALUATE_SHARE, True), (PREDICT, True)],
)
def test_the_workspace_of_cublas_is_fixed_before_the_device_is_touched(
    few_run: Path, few_digits: Path, tmp_path: Path, work: str, deterministic: bool
) -> None:
    script = FIRST_TOUCH.format(
        work=work.format(
            data=str(few_digits), storage=str(tmp_path), run=str(few_run),
            deterministic=deterministic,
        )
    )  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-c", script], env={**env, "PYTHONPATH": PYTHON_PATH},
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["touched with :4096:8"], done.stderr


AFTER_ANOTHER = """
import torch
from cifar_dist.model import seeding
seeding.WARN_ONLY = False
factor = lambda: torch.ones(64, 64, device="cuda")
seeding.set_seed(0, deterministic=False)
factor() @ factor()
seeding.set_seed(0, deterministic=True)
print((factor() @ factor()).sum().item())
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_deterministic_trial_may_follow_one_that_is_not() -> None:
    env = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-c", AFTER_ANOTHER], env={**env, "PYTHONPATH": PYTHON_PATH},
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.stdout.strip() == str(64.0**3), done.stderr
