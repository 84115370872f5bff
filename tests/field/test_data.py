"""Data as people have it: copied twice, cut short, unpacked beside itself, under other names."""

from __future__ import annotations

import contextlib
import gzip
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cifar_dist.config.model import EvaluateConfig
from cifar_dist.config.train import TrainConfig
from cifar_dist.data import cache, cached_file
from cifar_dist.data.cache import find_same, prepare, prepare_same
from cifar_dist.data.datasets import (
    Arrays,
    Decoded,
    LabelledImages,
    Source,
    earlier_fingerprints,
    find_source,
    sha256_of_files,
)
from cifar_dist.data.datasets.cifar10 import ARCHIVE
from cifar_dist.data.datasets.official import Official
from cifar_dist.errors import UserError
from cifar_dist.evaluate import evaluate
from cifar_dist.events import Event, Warned
from cifar_dist.registry import DATASETS, NETWORKS, DatasetTraits, with_traits
from cifar_dist.train import train
from tests.conftest import ROOT, run_command, write_parquet
from tests.data.datasets.test_cifar10 import SmallArchive
from tests.registering import register
from tests.runs.test_older_versions import TinyNetwork

TRAIN = "train-00000-of-00001.parquet"
TEST = "test-00000-of-00001.parquet"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CIFAR_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def random_images(seed: int, count: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def refused(folder: Path, dataset: str = "cifar10") -> str:
    """What is said of a folder that is not taken: one line."""
    with pytest.raises(UserError) as raised:
        prepare(dataset, find_source(dataset, folder, download=False))
    said = str(raised.value)
    assert "\n" not in said
    return said


# --- 1: images that are there twice -------------------------------------------------------------


@pytest.mark.parametrize(
    "second",
    ["train-00000-of-00001 (1).parquet", f"data/{TRAIN}", "train-copy.parquet",
     "train-00000-of-00001 - Copy.parquet"],
)  # fmt: skip
def test_a_file_was_downloaded_twice(small_parquet: Path, second: str) -> None:
    (small_parquet / second).parent.mkdir(exist_ok=True)
    shutil.copy(small_parquet / TRAIN, small_parquet / second)
    said = refused(small_parquet)
    assert TRAIN in said
    assert second in said
    assert "delete" in said


def test_the_test_file_is_a_copy_of_the_training_file(small_parquet: Path) -> None:
    shutil.copy(small_parquet / TRAIN, small_parquet / TEST)
    assert f"has the same content as {small_parquet / TRAIN}" in refused(small_parquet)


def test_a_shard_was_uploaded_again_with_other_bytes(small_parquet: Path) -> None:
    write_parquet(small_parquet / "new" / TRAIN, random_images(1, 9), np.arange(9))
    assert f"is the same shard as {small_parquet / 'new' / TRAIN}" in refused(small_parquet)


def test_the_images_were_written_twice_with_other_compression(small_parquet: Path) -> None:
    table = pq.read_table(small_parquet / TRAIN)
    pq.write_table(table, small_parquet / "train-again.parquet", compression="gzip")
    said = refused(small_parquet)
    assert "11 of 12 validation images are also trained on" in said or (
        "12 of 12 validation images are also trained on" in said
    )


def array_source(*splits: np.ndarray) -> Arrays:
    parts = [
        LabelledImages(images.transpose(0, 3, 1, 2), np.arange(len(images)) % 10)
        for images in splits
    ]
    return Arrays(Decoded(*parts, tuple("abcdefghij")))


def test_a_data_set_of_ones_own_has_images_twice(own_cache: Path) -> None:
    once = random_images(0, 60, 8)
    with pytest.raises(UserError, match=r"--dataset mine: 1\d of 12 validation images are also tr"):
        prepare("mine", array_source(np.concatenate([once, once]), random_images(1, 20, 8)))
    with pytest.raises(UserError, match=r"--dataset mine: 1\d of 20 test images are also trained"):
        prepare("mine", array_source(once, once[:20]))
    assert not list(own_cache.glob("*.safetensors"))


def test_a_well_known_data_set_has_a_few_images_twice() -> None:
    some, test = random_images(0, 20, 8), random_images(1, 300, 8)
    test[:3] = some[:3]  # maybe held out of training, therefore at most so many
    heard: list[Event] = []
    prepare("mine", array_source(some, test), listener=heard.append)
    (warned,) = heard
    assert isinstance(warned, Warned)
    assert " of 300 test images are also trained on" in warned.message


# --- 2: a shard that is missing -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (["train-00000-of-00002"], "train-00001-of-00002.parquet"),
        (["train-00001-of-00002"], "train-00000-of-00002.parquet"),
        (["train-00000-of-00003", "train-00002-of-00003"], "train-00001-of-00003.parquet"),
        (["train-0-of-2-a09b74"], "train-1-of-2-a09b74.parquet"),
        (["plain_text/train/0000", "plain_text/train/0002"], "0001.parquet"),
    ],
)
def test_a_shard_was_not_downloaded(tmp_path: Path, there: list[str], missing: str) -> None:
    for seed, name in enumerate(there):
        write_parquet(tmp_path / f"{name}.parquet", random_images(seed, 9), np.arange(9))
    write_parquet(tmp_path / "test.parquet", random_images(9, 9), np.arange(9))
    assert f"but no {missing}; fetch it, too" in refused(tmp_path)


def test_shards_of_two_downloads_lie_together(tmp_path: Path) -> None:
    names = [TRAIN, "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    for seed, name in enumerate(names):
        write_parquet(tmp_path / name, random_images(seed, 9), np.arange(9))
    write_parquet(tmp_path / "test.parquet", random_images(9, 9), np.arange(9))
    assert "is a shard of other data than" in refused(tmp_path)


# --- 3: a cache that is damaged -----------------------------------------------------------------


def zeroed(file: Path, at: int = -5000, size: int = 4096) -> None:
    content = bytearray(file.read_bytes())
    at %= len(content)
    content[at : at + size] = bytes(len(content[at : at + size]))
    file.write_bytes(content)


def flipped(file: Path) -> None:
    """One bit of the statistics in the header, which still reads as a header."""
    content = file.read_bytes()
    at = content.index(b"mean") + 10
    file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


DAMAGE = {
    "a zeroed block": zeroed,
    "a zeroed start": lambda file: zeroed(file, 0),
    "cut short": lambda file: os.truncate(file, file.stat().st_size - 100_000),
    "cut in its header": lambda file: os.truncate(file, 100),
    "empty": lambda file: os.truncate(file, 0),
    "longer than it was": lambda file: file.write_bytes(file.read_bytes() + b"more"),
    "one bit": flipped,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_power_was_cut_and_the_cache_is_damaged(small_parquet: Path, damage: str) -> None:
    def here(listener) -> tuple[cache.CachedDataset, bytes]:
        dataset = prepare("cifar10", find_source("cifar10", small_parquet), None, listener)
        return dataset, dataset.path.read_bytes()

    heard: list[Event] = []
    dataset, content = here(heard.append)
    assert here(heard.append) == (dataset, content)
    assert heard == []
    DAMAGE[damage](dataset.path)
    assert here(heard.append) == (dataset, content)
    (warned,) = heard
    assert isinstance(warned, Warned)
    assert warned.message == (
        f"{dataset.path}: is damaged, e.g. by a power cut; decoding the data anew"
    )


def test_another_node_lost_power(small_parquet: Path, tmp_path: Path) -> None:
    dataset = prepare("cifar10", find_source("cifar10", small_parquet))
    content = dataset.path.read_bytes()
    zeroed(dataset.path)
    heard: list[Event] = []
    found = prepare_same("cifar10", small_parquet, dataset.fingerprint, heard.append)
    assert (found, found.path.read_bytes()) == (dataset, content)
    assert len(heard) == 1
    os.truncate(dataset.path, 1000)
    with pytest.raises(UserError, match="none: has no CIFAR-10"):  # a report has no other images
        find_same("cifar10", tmp_path / "none", dataset.fingerprint)
    assert find_same("cifar10", small_parquet, dataset.fingerprint) == dataset


def test_the_power_is_cut_right_after_the_cache_was_written(
    small_parquet: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, order = os.fsync, []
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("synced"), real(file)))
    renamed = os.replace
    monkeypatch.setattr(os, "replace", lambda *two: (order.append("renamed"), renamed(*two)))
    prepare("cifar10", find_source("cifar10", small_parquet))
    assert order == ["synced", "renamed"]


def test_a_process_was_killed_while_it_wrote_the_cache(
    small_parquet: Path, own_cache: Path
) -> None:
    source = find_source("cifar10", small_parquet)
    file = prepare("cifar10", source).path
    left = file.with_name(f".{file.name}.0123abcd.tmp")
    file.rename(left)
    assert prepare("cifar10", source).path == file
    assert not left.exists()


def test_a_run_begins_on_a_damaged_cache(small_parquet: Path, tmp_path: Path) -> None:
    words = ["--data-dir", str(small_parquet), "--num-workers", "0", "--max-epochs", "1",
             "--batch-size", "27", "--image-size", "8", "--no-report"]  # fmt: skip
    source = find_source("cifar10", small_parquet)
    dataset = prepare("cifar10", source)
    zeroed(dataset.path)
    done = run_command(tmp_path, *words)
    assert done.code == 0, done.err
    assert "is damaged, e.g. by a power cut; decoding the data anew" in done.out + done.err
    assert cached_file.is_intact(dataset.path)


# --- 4: what lies beside the data ---------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallArchive:
    """A small archive with a readme, as data set ``cifar10``."""
    made = SmallArchive(tmp_path, images=12)
    known_as(monkeypatch, made.known.find)
    return made


def known_as(monkeypatch: pytest.MonkeyPatch, find) -> None:
    register(monkeypatch, DATASETS, "cifar10", with_traits(DatasetTraits(title="CIFAR-10"))(find))


def unpacked(small: SmallArchive, folder: Path) -> Path:
    shutil.copytree(small.folder, folder / ARCHIVE.folder)
    return folder


def test_a_file_manager_was_in_the_unpacked_folder(small: SmallArchive, tmp_path: Path) -> None:
    folder = unpacked(small, tmp_path / "data")
    before = find_source("cifar10", folder).fingerprint()
    (folder / ARCHIVE.folder / ".DS_Store").write_bytes(b"positions of icons")
    (folder / ARCHIVE.folder / "notes.txt").write_text("mine")
    assert find_source("cifar10", folder).fingerprint() == before


def test_the_archive_was_unpacked_beside_itself(small: SmallArchive, tmp_path: Path) -> None:
    packed = prepare("cifar10", find_source("cifar10", small.archive.parent))
    unpacked(small, small.archive.parent)
    source = find_source("cifar10", small.archive.parent)
    assert source.path.is_dir()
    assert prepare("cifar10", source) == packed
    # Another node has one or the other, and no cache.
    os.environ["CIFAR_DIST_CACHE"] = str(tmp_path / "another")
    other = prepare_same("cifar10", small.archive.parent, packed.fingerprint)
    assert other.path.read_bytes() == packed.path.read_bytes()


def test_the_archive_keeps_the_fingerprint_of_earlier_versions(small: SmallArchive) -> None:
    found = find_source("cifar10", small.archive.parent).fingerprint()
    assert found == sha256_of_files([small.archive])


def run_config(folder: Path, tmp_path: Path, **changes) -> TrainConfig:
    return TrainConfig(
        data_dir=str(folder), num_workers=0, batch_size=27, image_size=8, report=False,
        storage_path=str(tmp_path / "runs"), name="run", **changes,
    )  # fmt: skip


@dataclass(frozen=True)
class AsBefore(Official):
    """The official archive with the fingerprint that versions up to 0.2.0 computed."""

    def fingerprint(self) -> str:
        files = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        return sha256_of_files(file for file in files if file.is_file())


@pytest.mark.parametrize("now", ["the same folder", "a clean folder", "the archive"])
def test_a_run_of_an_earlier_version_is_resumed_on_its_folder(
    small: SmallArchive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: str
) -> None:
    register(monkeypatch, NETWORKS, "resnet18", TinyNetwork)
    folder = unpacked(small, tmp_path / "data")
    if now == "the same folder":  # whose .DS_Store was part of the fingerprint
        (folder / ARCHIVE.folder / ".DS_Store").write_bytes(b"positions of icons")
    known_as(monkeypatch, lambda data: AsBefore(data / ARCHIVE.folder, small.known))
    before = train(run_config(folder, tmp_path, max_epochs=1)).run
    known_as(monkeypatch, small.known.find)
    if now == "a clean folder":  # when the run was started; by now it has been looked into
        (folder / ARCHIVE.folder / ".DS_Store").write_bytes(b"positions of icons")
    here = small.archive.parent if now == "the archive" else folder
    assert find_source("cifar10", here).fingerprint() != before.started_with_fingerprint()
    resumed = train(run_config(here, tmp_path, max_epochs=2, resume=True)).run
    assert [row["epoch"] for row in resumed.read_metrics()] == [1, 2]
    assert resumed.started_with_fingerprint() == before.started_with_fingerprint()
    assert evaluate(EvaluateConfig(model=str(resumed.path))).scores.images == 12


def test_a_run_of_an_earlier_version_is_not_resumed_on_other_images(
    small: SmallArchive, tmp_path: Path
) -> None:
    other = SmallArchive(tmp_path / "other", seed=1, images=12)
    wanted = AsBefore(other.folder, other.known).fingerprint()
    source = find_source("cifar10", small.archive.parent)
    assert wanted not in earlier_fingerprints(source)
    assert prepare("cifar10", source, wanted).fingerprint == source.fingerprint()


# --- 5: no room, no permission, no home ---------------------------------------------------------


@contextlib.contextmanager
def no_room(room: int = 20_000) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_disk_is_full_while_the_cache_is_written(small_parquet: Path, own_cache: Path) -> None:
    source = find_source("cifar10", small_parquet)
    with no_room(), pytest.raises(UserError, match=r"cannot be written there \(.*CIFAR_DIST_CACHE"):
        prepare("cifar10", source)
    assert not list(own_cache.glob("*.safetensors"))
    assert not list(own_cache.glob("*.tmp"))
    assert not list(own_cache.glob(".*.tmp"))
    assert prepare("cifar10", source).original_images == 60


def test_the_temporary_folder_is_full(
    small: SmallArchive, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(tmp_path / "not there"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    assert prepare("cifar10", find_source("cifar10", small.archive.parent)).original_images == 60


@contextlib.contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Take write permission for a folder from this process, root's too."""
    before = folder.stat().st_mode
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(before)


def test_the_cache_is_read_only_but_holds_the_data(
    small_parquet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_source("cifar10", small_parquet)
    fingerprint = source.fingerprint()
    with tempfile.TemporaryDirectory() as folder:  # which others may enter, unlike a test's
        Path(folder).chmod(0o755)
        shared = Path(folder) / "cache"
        monkeypatch.setenv("CIFAR_DIST_CACHE", str(shared))
        before = prepare("cifar10", source)
        for left in shared.glob("*.lock"):
            left.unlink()
        with as_nobody(shared):
            assert prepare("cifar10", Known(source, fingerprint)) == before
            assert prepare_same("cifar10", "/not/looked/at", fingerprint) == before
            with pytest.raises(UserError, match=r"Permission denied.*variable CIFAR_DIST_CACHE"):
                prepare("other", Known(source, fingerprint))


@dataclass(frozen=True)
class Known:
    """A source whose fingerprint is known: its folder cannot be entered by others."""

    source: Source
    known: str

    def fingerprint(self) -> str:
        return self.known

    def decode(self) -> Decoded:
        return self.source.decode()


HOMELESS = """
import os
import sys

os.environ.pop("HOME", None)
import pwd

def nobody(uid):
    raise KeyError(uid)

pwd.getpwuid = nobody  # as in a container that is run under a number of no user
from cifar_dist.cluster.session import find_token
from cifar_dist.config.train import TrainConfig, with_absolute_paths
from cifar_dist.data.cache import cache_folder
from cifar_dist.errors import UserError
from cifar_dist.model.weights import imagenet_folder
from cifar_dist.storage import at

assert find_token() is None
config = TrainConfig(data_dir="~/data")
paths = lambda: at("~/runs"), lambda: with_absolute_paths(config)
for use in (cache_folder, imagenet_folder, *paths):
    try:
        print(use())
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {},
            [
                "set CIFAR_DIST_CACHE to one",
                "set TORCH_HOME to one",
                "~/runs: there is no home",
                "~/data: ",
            ],
        ),
        (
            {"CIFAR_DIST_CACHE": "{}/c", "TORCH_HOME": "{}/t"},
            ["/c", "/t/hub/checkpoints", "HOME", "HOME"],
        ),
        ({"XDG_CACHE_HOME": "{}/x"}, ["/x/cifar_dist", "/x/torch/hub/checkpoints", "HOME", "HOME"]),
    ],
)
def test_home_is_not_set(tmp_path: Path, variables: dict[str, str], said: list[str]) -> None:
    unset = ("HOME", "XDG_CACHE_HOME", "CIFAR_DIST_CACHE", "TORCH_HOME")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {name: value.format(tmp_path) for name, value in variables.items()}
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line, words in zip(done.stdout.splitlines(), said, strict=True):
        assert words in line


# --- 6: other names, other layouts --------------------------------------------------------------


@pytest.mark.parametrize("problem", ["closed", "damaged", "missing", "a folder"])
def test_a_batch_cannot_be_read(small: SmallArchive, tmp_path: Path, problem: str) -> None:
    folder = unpacked(small, tmp_path / "data")
    batch = folder / ARCHIVE.folder / "data_batch_3"
    if problem == "damaged":
        zeroed(batch, 100, 9)
    else:
        batch.unlink()
    if problem == "closed":  # for root, too: a link that leads to itself
        batch.symlink_to(batch)
    if problem == "a folder":
        batch.mkdir()
    said = refused(folder)
    assert str(batch) in said
    assert "has MD5" in said if problem == "damaged" else "cannot be read" in said


def test_half_an_archive_was_unpacked_beside_it(small: SmallArchive) -> None:
    folder = unpacked(small, small.archive.parent)
    (folder / ARCHIVE.folder / "data_batch_3").unlink()
    assert find_source("cifar10", folder).path == small.archive


@pytest.mark.parametrize("given", ["the folder of batches", "the archive", "another name"])
def test_the_data_itself_is_given_as_its_folder(
    small: SmallArchive, tmp_path: Path, given: str
) -> None:
    at = {
        "the folder of batches": small.folder,
        "the archive": small.archive,
        "another name": tmp_path / "cifar.tgz",
    }[given]
    if given == "another name":
        small.archive.rename(at)
    found = prepare("cifar10", find_source("cifar10", at))
    assert (found.original_images, found.test_images) == (60, 12)


@pytest.mark.parametrize("name", ["cifar-10-python.tar", "cifar-10-python (1).tar.gz"])
def test_a_browser_unzipped_or_renamed_the_archive(
    small: SmallArchive, tmp_path: Path, name: str
) -> None:
    before = prepare("cifar10", find_source("cifar10", small.archive.parent))
    (folder := tmp_path / "Downloads").mkdir()
    content = small.archive.read_bytes()
    (folder / name).write_bytes(gzip.decompress(content) if name.endswith(".tar") else content)
    assert prepare("cifar10", find_source("cifar10", folder)) == before
    (folder / name).write_bytes(content[:5000])
    assert f"{name}: has MD5" in refused(folder)


def hub(folder: Path, train_file: str, test_file: str) -> Path:
    for seed, (name, count) in enumerate(((train_file, 12), (test_file, 5))):
        write_parquet(folder / name, random_images(seed, count), np.arange(count) % 10)
    return folder


@pytest.mark.parametrize(
    ("train_file", "test_file"),
    [
        ("plain_text/train/0000.parquet", "plain_text/test/0000.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
        ("cifar10-train.parquet", "cifar10-test.parquet"),
        ("plain_text/cifar10-train.parquet", "plain_text/cifar10-test.parquet"),
        ("plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet"),
        ("Train.parquet", "Test.parquet"),
    ],
)
def test_files_have_another_name_on_the_hub(
    tmp_path: Path, train_file: str, test_file: str
) -> None:
    source = find_source("cifar10", hub(tmp_path, train_file, test_file))
    found = prepare("cifar10", source)
    assert (found.original_images, found.test_images) == (12, 5)
    expected = random_images(0, 12).transpose(0, 3, 1, 2)
    assert np.array_equal(found.open()[0].images, expected)


def test_one_parquet_file_is_given_as_the_folder(small_parquet: Path) -> None:
    file = small_parquet / TRAIN
    assert refused(file) == f"{file}: is a file, and no archive of CIFAR-10; name its folder"


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([{"path": "a.png"}] * 2, "column img holds struct<path: string>; needs encoded images"),
        ([{"path": "a.png", "bytes": None}] * 2, "2 of 2 rows hold no image, the first is row 0: "),
        ([{"path": "a.png", "bytes": b"x"}, None], "1 of 2 rows hold no image, the first is row 1"),
        (["a.png", "b.png"], "column img holds string; needs encoded images"),
        ([[0, 255], [3, 4]], "column img holds list<"),
    ],
)
def test_rows_hold_no_images(tmp_path: Path, cells: list, said: str) -> None:
    for split, labels in (("train", [0, 1]), ("test", [1, 2])):
        pq.write_table(pa.table({"img": cells, "label": labels}), tmp_path / f"{split}.parquet")
    assert said in refused(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (None, "there is no such folder"),
        ([], "it is empty"),
        (["notes.txt", "val/a.png"], "it holds notes.txt, val/"),
        ([f"{n}.png" for n in range(9)], "it holds 0.png, 1.png, 2.png, 3.png, 4.png, 5.png and 3"),
    ],
)
def test_the_folder_holds_something_else(tmp_path: Path, files: list | None, said: str) -> None:
    folder = tmp_path / "data"
    for name in files or ():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    if files == []:
        folder.mkdir()
    assert refused(folder).endswith(f"name the folder that does with --data-dir ({said})") or (
        files is not None and len(files) > 6 and said in refused(folder)
    )


def test_the_network_is_down_and_the_folder_holds_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nobody-listens")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"^no CIFAR-10 in .*the download failed") as raised:
        find_source("cifar10", tmp_path)
    assert str(raised.value).endswith("name their folder with --data-dir (it holds notes.txt)")
