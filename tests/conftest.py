"""What tests share: a cache of their own, one Ray cluster, the command line, small data sets."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.processes import PATIENCE_S, end_marked, mark_own

ROOT = Path(__file__).resolve().parent.parent
PYTHON_PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
"""Of commands that tests start: packages may have been installed into a folder that it names."""

_MARK = mark_own()
RAYS = re.compile(r"^ray::|/ray/")
"""In the command lines of Ray's processes."""
NEEDS_RAY_INTERNALS = pytest.mark.skipif(
    os.environ.get("CIFAR_DIST_PLAIN_RAY", "") not in ("", "0"),
    reason="CIFAR_DIST_PLAIN_RAY is set: what this tests needs Ray's private names",
)

# Tests start their own Ray, and never join one that somebody else runs on the machine.
os.environ["RAY_ADDRESS"] = "local"


@pytest.fixture(scope="session", autouse=True)
def _no_process_left_behind() -> Iterator[None]:
    """End what tests have started, failed ones too, and fail where there was anything to end."""
    yield
    # Ray's own are ended too, but are no fault: where a test kills a driver, nobody else ends them.
    ended = {pid: each for pid, each in end_marked(_MARK).items() if not RAYS.search(each)}
    if ended:
        lines = [f"{pid} {command[:150]}" for pid, command in sorted(ended.items())]
        pytest.fail("\n".join(["processes that tests left behind, now killed:", *lines]))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["CIFAR_DIST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _nothing_undetermined_on_a_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests on a GPU an operation that is not deterministic raises."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("gpu"):
            patch.setattr("cifar_dist.model.seeding.WARN_ONLY", False)
        yield


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One cluster for all tests of a session; more CPUs than the machine has, for 3 workers."""
    import ray

    ray.init(
        num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR"
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a folder in a bucket of a server that speaks S3."""
    from tests.object_store import object_store

    with object_store(tmp_path_factory.mktemp("store") / "log") as address:
        yield address


@pytest.fixture(scope="session")
def real_cifar10() -> Path:
    """The folder with real CIFAR-10 images."""
    folder = os.environ.get("CIFAR_DIST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real CIFAR-10 images: set CIFAR_DIST_DATA to their folder")
    return Path(folder).absolute()


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str
    seconds: float


def run_command(folder: Path, *words: str, module: str = "cifar_dist.train") -> Finished:
    """Run ``python -m module`` in a folder, as a user does."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def started_command(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start ``python -m cifar_dist.train`` in a folder, as a leader of its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "cifar_dist.train", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def encoded(image: np.ndarray, form: str = "PNG") -> bytes:
    """``[32, 32, 3]`` bytes as an image file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return file.getvalue()


def write_parquet(
    file: Path, images: np.ndarray, labels: np.ndarray, column: str = "img", struct: bool = True
) -> None:
    """``[n, 32, 32, 3]`` images as a Parquet file in the Hugging Face layout."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file.parent.mkdir(parents=True, exist_ok=True)
    cells = [encoded(image) for image in images]
    values = [{"bytes": cell, "path": None} for cell in cells] if struct else cells
    pq.write_table(pa.table({column: values, "label": labels.astype(np.int64)}), file)


def first_images(source: Path, folder: Path, train: int, test: int) -> None:
    """Write the first images of each split of Parquet files to a folder."""
    import pyarrow.parquet as pq

    for split, count in (("train", train), ("test", test)):
        file = min(source.glob(f"{split}*.parquet"))
        pq.write_table(pq.read_table(file).slice(0, count), folder / file.name)


@pytest.fixture
def small_parquet(tmp_path: Path) -> Path:
    """A folder with 60 training and 20 test images in the Hugging Face layout."""
    random = np.random.default_rng(0)
    folder = tmp_path / "parquet"
    for split, count in (("train", 60), ("test", 20)):
        images = random.integers(0, 256, (count, 32, 32, 3), np.uint8)
        write_parquet(folder / f"{split}-00000-of-00001.parquet", images, np.arange(count) % 10)
    return folder


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the Hugging Face layout with real digits: 144 to train on, 16 to validate, 40
    to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.repeat(np.repeat(digits.images * 15, 4, axis=1), 4, axis=2).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=3)
    folder = tmp_path_factory.mktemp("few_digits")
    for split, part in (("train", slice(0, 160)), ("test", slice(160, 200))):
        write_parquet(folder / f"{split}-00000-of-00001.parquet", images[part], digits.target[part])
    return folder
