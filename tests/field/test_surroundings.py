"""What a person's machine does to a command: exceptions, pipes, variables, file names, typing."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning_utilities.core.rank_zero import rank_zero_only

from cifar_dist.config.model import PredictConfig
from cifar_dist.config.train import TrainConfig
from cifar_dist.config.tune import TuneConfig
from cifar_dist.events import EpochDone, Event
from cifar_dist.predict import predict
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.terminal.hints import in_one_line
from cifar_dist.terminal.run import Display
from cifar_dist.terminal.search import SearchDisplay
from cifar_dist.train import train
from cifar_dist.tune import search
from tests.conftest import PYTHON_PATH, encoded
from tests.processes import PATIENCE_S
from tests.training.small import Small, small_network

TRACEBACK_IN = "; its traceback is in "


def shell(
    line: str, folder: Path, data: bytes = b"", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in a folder; ``$python`` is this interpreter."""
    names = {**os.environ, "PYTHONPATH": PYTHON_PATH, "python": sys.executable, **variables}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=names, input=data, capture_output=True,
        timeout=PATIENCE_S,
    )  # fmt: skip


def a_command(body: str) -> str:
    """A line of bash that runs a command of the package whose body is this."""
    return f"""$python -c 'from cifar_dist.cli import *\ndef main(words):\n {body}
run_command(main)'"""


def few(data: Path, storage: Path, **settings) -> TrainConfig:
    """The config of a run of seconds in this process."""
    return TrainConfig(
        data_dir=str(data), num_workers=0, batch_size=24, flip=0.0, report=False,
        storage_path=str(storage), name="a", **settings,
    )  # fmt: skip


# An exception that no code expects


def test_an_exception_that_nobody_expects_is_one_line_and_a_file(tmp_path: Path) -> None:
    done = shell(a_command('{}["a\\nkey"]'), tmp_path, TMPDIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, b"")
    line, file = done.stderr.decode().removesuffix("\n").split(TRACEBACK_IN)
    assert line == "error: KeyError: 'a\\nkey'"
    assert Path(file).parent == tmp_path
    assert Path(file).read_text().startswith("Traceback (most recent call last)")
    assert "in main" in Path(file).read_text()


def test_an_exception_where_there_is_no_room_for_its_traceback_says_where(tmp_path: Path) -> None:
    done = shell("ulimit -f 0; " + a_command("1 / 0"), tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        b"error: ZeroDivisionError: division by zero; raised at <string>:3 (no room for its "
        b"traceback)\n"
    )


@pytest.mark.parametrize("command", ["train", "tune"])
def test_an_exception_before_anything_was_trained_leaves_the_name_free(
    tmp_path: Path, monkeypatch, command: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("cifar_dist.data.datasets.find_source", fails)
    config = few(tmp_path, tmp_path / "runs")
    for _ in range(2):  # the second one finds the name free
        with pytest.raises(OSError, match="Input/output error") as caught:
            train(config) if command == "train" else search(
                TuneConfig(train=config.replace(num_workers=1))
            )
        assert not hasattr(caught.value, "__notes__")
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_exception_after_an_epoch_keeps_it_and_says_how_to_resume(
    tmp_path: Path, few_digits: Path
) -> None:
    def listen(event: Event) -> None:
        if isinstance(event, EpochDone) and event.row["epoch"] == 2:
            raise KeyError("a bug")

    config = few(few_digits, tmp_path, max_epochs=3)
    with small_network(Small), pytest.raises(KeyError) as caught:
        train(config, listen)
    assert caught.value.__notes__ == [
        f"to resume: python -m cifar_dist.train --name a --resume --storage-path {tmp_path}"
    ]
    assert RunDirectory.at(str(tmp_path), "a").read_summary()["status"] == "failed"
    with small_network(Small):
        assert train(config.replace(resume=True)).summary["status"] == "completed"


def test_the_line_of_an_exception_is_followed_by_how_to_resume(tmp_path: Path) -> None:
    body = 'error = OSError(5, "disk"); error.add_note("to resume: type this"); raise error'
    done = shell(a_command(body.replace('"', "`")).replace("`", '"'), tmp_path)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[1:] == ["to resume: type this"]


# Output that nobody reads


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("count", [3, 100_000])
def test_output_in_a_pipe_that_closes_ends_the_command_quietly(
    tmp_path: Path, count: int, unbuffered: str
) -> None:
    line = a_command(f"for number in range({count}): print(number)")
    line += " | (read first; echo $first); echo ${PIPESTATUS[0]}"
    done = shell(line, tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert done.stdout == b"0\n0\n"
    assert done.stderr == b""


def test_output_to_a_full_disk_is_one_line(tmp_path: Path) -> None:
    done = shell(a_command("print(1)") + " > /dev/full", tmp_path, PYTHONUNBUFFERED="")
    assert done.returncode == 1
    assert done.stderr == b"error: the output cannot be written (No space left on device)\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_command_without_standard_streams_does_what_it_does(tmp_path: Path, closed: str) -> None:
    body = 'sys.stdout.write("1"); open("done", "w"); raise UserError("wrong")'
    done = shell(a_command(body) + f" {closed}", tmp_path)
    assert done.returncode == 2
    assert (tmp_path / "done").exists()
    assert done.stderr == (b"" if "2" in closed else b"error: wrong\n")


@pytest.mark.parametrize("kind", [Display, SearchDisplay])
def test_a_run_goes_on_where_its_display_is_closed(kind) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        for _ in range(2):
            kind(stream).line("epoch 1")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # for the stream's own end


def test_output_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    done = shell(a_command('print("caf\\u00e9 \\udce9")'), tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"caf\\xe9 \\udce9\n")


# Variables of launchers

LAUNCHERS = {
    "an interactive Slurm job": {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0",
                                 "SLURM_JOB_NAME": "train"},
    "one task of a Slurm job": {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4",
                                "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train",
                                "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "1"},
    "torchrun": {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "GROUP_RANK": "1",
                 "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "29500",
                 "TORCHELASTIC_RUN_ID": "a"},
    "Kubeflow": {"RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "train-master-0",
                 "MASTER_PORT": "23456", "PET_NNODES": "3", "PET_NPROC_PER_NODE": "1"},
    "LSF": {"LSB_JOBID": "7", "JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_LOCAL_RANK": "1",
            "JSM_NAMESPACE_SIZE": "2", "LSB_DJOB_RANKFILE": "/nowhere"},
    "MPI": {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "PMI_RANK": "2"},
    "Lightning's own": {"PL_TRAINER_MAX_STEPS": "1", "PL_TRAINER_LIMIT_TRAIN_BATCHES": "1",
                        "NODE_RANK": "1", "LOCAL_RANK": "1"},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory: pytest.TempPathFactory, few_digits: Path) -> str:
    with small_network(Small):
        trained = train(few(few_digits, tmp_path_factory.mktemp("plain"), max_epochs=1))
    return trained.outcome.weights_sha256


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_training_without_ray_inside_a_launchers_job_is_training_alone(
    tmp_path: Path, few_digits: Path, plain_weights: str, monkeypatch, launcher: str
) -> None:
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    # As Lightning sets it when it is imported in such a job.
    monkeypatch.setattr(rank_zero_only, "rank", _get_rank() or 0)
    before = dict(os.environ)
    with small_network(Small):
        trained = train(few(few_digits, tmp_path, max_epochs=1, logger="tensorboard"))
    assert trained.outcome.weights_sha256 == plain_weights
    assert trained.run.checkpoint(1).is_file()
    assert list((trained.run.path / "tensorboard").glob("events.*"))
    assert dict(os.environ) == before


# The folder of Ray's sockets

SESSION = """
import os
from cifar_dist.cluster.session import session

with session():
    import ray
    print(ray.nodes()[0]["Alive"], "RAY_TMPDIR" in os.environ)
"""
FOLDER = """
import os
from cifar_dist.cluster.session import _in_usable_folder

if not os.getuid():  # root may use everybody's folders
    os.setuid(65534)
with _in_usable_folder("local"):
    print(os.environ.get("RAY_TMPDIR"))
    for folder in ("/tmp/cifar_dist-65534", "/var/tmp/cifar_dist-65534"):
        if os.path.isdir(folder):
            os.rmdir(folder)
"""


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    names = {**os.environ, "PYTHONPATH": PYTHON_PATH, **variables}
    names = {name: value for name, value in names.items() if value}
    return subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=names, capture_output=True, text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip


def test_ray_starts_where_tmpdir_is_too_long_for_its_sockets(tmp_path: Path) -> None:
    folder = tmp_path / ("t" * 75)
    folder.mkdir()
    done = run_python(SESSION, TMPDIR=str(folder), RAY_TMPDIR="", RAY_ADDRESS="local")
    assert done.stdout == "True False\n", done.stderr


def test_a_ray_folder_of_another_user_is_avoided() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        rays = Path(folder, "ray")
        for make in (lambda: rays.mkdir(mode=0o700), lambda: rays.chmod(0o777)):
            make()
            # Where Ray runs as another user it leaves a file that only they may write.
            (rays / "ray_current_cluster").touch(mode=0o600)
            done = run_python(FOLDER, TMPDIR=folder, RAY_TMPDIR="")
            assert done.stdout.startswith("/tmp"), done.stderr
        refused = run_python(FOLDER, RAY_TMPDIR=folder)
        assert refused.stderr.strip().endswith(
            f"RAY_TMPDIR {folder}: its ray/ray_current_cluster is another user's; name another "
            "folder"
        )


def test_a_ray_folder_that_is_named_and_too_long_is_refused_in_one_line(tmp_path: Path) -> None:
    done = run_python(FOLDER, RAY_TMPDIR=f"/tmp/{'t' * 75}")
    assert "has 80 characters, and Ray's sockets allow for at most" in done.stderr


# Pictures of all sorts


@pytest.fixture(scope="module")
def model(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    config = few(few_digits, tmp_path_factory.mktemp("model"), max_epochs=1)
    return str(train(config).run.path)


def picture(form: str = "PNG") -> bytes:
    return encoded(np.zeros((32, 32, 3), np.uint8), form)


def predict_in(
    folder: Path, model: str, *words: str, data: bytes = b"", then: str = "", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    line = shlex.join(["-m", "cifar_dist.predict", model, *words])
    return shell(f"$python {line} {then}", folder, data, **variables)


def names(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    return [line.split(b"  ")[-1].decode() for line in done.stdout.splitlines()]


def errors(done: subprocess.CompletedProcess[bytes]) -> list[str]:
    lines = done.stderr.decode().splitlines()
    return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]


def test_predicting_a_folder_of_all_sorts_of_files(tmp_path: Path, model: str) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    latin = os.fsdecode(b"caf\xe9.png")
    for name in ("a.png", latin, "two\nlines.png", "caf\u00e9.png"):
        (folder / name).write_bytes(picture())
    for name in ("._a.png", "paper.pdf", "arrays.h5", "film.mpg", "notes.txt"):
        (folder / name).write_bytes(b"\x89HDF\r\n\x1a\n")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    (folder / "lost.png").symlink_to("nowhere.png")
    for encoding in ("utf-8", "ascii"):
        done = predict_in(tmp_path, model, "all", PYTHONIOENCODING=encoding)
        assert done.returncode == 1
        accent = "\u00e9" if encoding == "utf-8" else "\\xe9"
        assert sorted(names(done)) == sorted(
            ["all/a.png", "all/caf\\udce9.png", "all/two\\nlines.png", f"all/caf{accent}.png"]
        )
        assert errors(done) == [
            "all/broken.png: is no image", "all/lost.png: No such file or directory",
        ]  # fmt: skip


def test_predicting_into_a_pipe_that_closes(tmp_path: Path, model: str) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    then = "| head -1; echo ${PIPESTATUS[0]}"
    done = predict_in(tmp_path, model, *["a.png"] * 400, then=then)
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [b"a.png", b"0"]
    assert b"rror" not in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("list_", "found", "missing"),
    [
        (b"none.png\na.png\n", ["a.png"], ["none.png"]),
        (b"caf\xe9.png\na.png\nnone\xe9.png", ["caf\\udce9.png", "a.png"], ["none\\udce9.png"]),
        (b"none.png\nnor this.png\n", [], ["none.png", "nor this.png"]),
        (b"\xef\xbb\xbfa.png\r\n\r\nb.png\r\n", ["a.png", "b.png"], []),
        (b"a.png\n" + b"n" * 5000 + b"\n", ["a.png"], ["n" * 5000]),
    ],
)
def test_predicting_a_list_with_missing_and_foreign_names(
    tmp_path: Path, model: str, monkeypatch, list_: bytes, found: list[str], missing: list[str]
) -> None:
    for name in ("a.png", "b.png", os.fsdecode(b"caf\xe9.png")):
        (tmp_path / name).write_bytes(picture())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(list_)))
    done = list(predict(PredictConfig(model=model, images=("-",))))
    assert [in_one_line(each.image) for each in done if each.classes] == found
    assert [in_one_line(each.image) for each in done if each.error] == missing


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
def test_predicting_an_image_from_standard_input(model: str, monkeypatch, form: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(picture(form))))
    (done,) = predict(PredictConfig(model=model, images=("-",)))
    assert (done.image, done.error, len(done.classes)) == ("-", None, 1)


def test_predicting_with_an_empty_folder_among_others_or_a_closed_input(
    tmp_path: Path, model: str
) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "empty").mkdir()
    done = predict_in(tmp_path, model, "empty", "a.png")
    assert (done.returncode, names(done)) == (1, ["a.png"])
    assert errors(done) == ["empty: holds no images"]
    done = predict_in(tmp_path, model, "-", then="<&-")
    assert done.returncode == 2
    assert errors(done)[0].startswith("-: standard input is closed")
