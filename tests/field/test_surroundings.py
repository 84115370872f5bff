"""What a person's machine does to a command: exceptions, pipes, variables, file names, typing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning_utilities.core.rank_zero import rank_zero_only

from cifar_dist.cli import parse_predict, parse_train, parse_tune
from cifar_dist.cluster.trainer import Work, ray_settings, train_on_ray
from cifar_dist.config.files import read_settings
from cifar_dist.config.train import TrainConfig, with_absolute_paths
from cifar_dist.config.tune import TuneConfig
from cifar_dist.errors import UserError
from cifar_dist.events import EpochDone, Event, RestartCounter, Started
from cifar_dist.model.seeding import set_deterministic
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.search.space import read_space
from cifar_dist.terminal.run import Display
from cifar_dist.terminal.search import SearchDisplay
from cifar_dist.train import train
from cifar_dist.tune import search
from tests.conftest import PYTHON_PATH
from tests.processes import PATIENCE_S
from tests.training.small import Small, few, small_network

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
    return f"""$python -c 'from cifar_dist.exits import *\ndef main(words):\n {body}
run_command(main)'"""


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


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        (f"/tmp/{'t' * 75}", "has 80 characters, and Ray's sockets allow for at most"),
        ("relative", "RAY_TMPDIR relative: is no absolute path; name another folder"),
        ("/etc/passwd", "RAY_TMPDIR /etc/passwd: cannot be created (File exists)"),
    ],
)
def test_a_ray_folder_that_is_named_and_cannot_be_used_is_refused(folder: str, said: str) -> None:
    done = run_python(FOLDER, RAY_TMPDIR=folder)
    assert said in done.stderr.splitlines()[-1]


# What is typed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 0.1\nseed: 3\nlr: 0.2\n", "lr is there twice, in lines 1 and 3; keep one of them"),
        ("{lr: 0.1, lr: 0.1}", "lr is there twice, in lines 1 and 1"),
        ("'lr': 0.1\nlr: 0.2\n", "lr is there twice, in lines 1 and 2"),
    ],
)
def test_a_yaml_file_with_a_key_twice_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "conf.yaml").write_text(text)
    with pytest.raises(UserError, match=f"--config .*conf.yaml: {said}"):
        parse_train(["--config", str(tmp_path / "conf.yaml")])


def test_a_space_with_a_key_twice_at_any_depth_is_refused(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("lr:\n  choice: [0.1]\n  choice: [0.2]\n")
    with pytest.raises(UserError, match=r"--space .*choice is there twice, in lines 2 and 3"):
        read_space(str(space))


def test_a_yaml_file_that_merges_a_mapping_may_override_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "conf.yaml"
    file.write_text("a: &a {lr: 0.1, seed: 1}\nb:\n  <<: *a\n  lr: 0.2\n")
    assert read_settings(file)["b"] == {"lr": 0.2, "seed": 1}


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--use-gpu=True"], "--use-gpu"),
        (["--use_gpu=true"], "--use-gpu"),
        (["--use-gpu", "True"], "--use-gpu"),
        (["--use-gpu=False"], "--no-use-gpu"),
        (["--no-report=0"], "--report"),
        (["--resume=yes", "--name", "a"], "--resume"),
        (["--tf32=maybe"], "--tf32 or --no-tf32"),
    ],
)
@pytest.mark.parametrize("parse", [parse_train, parse_tune])
def test_a_switch_with_a_value_says_that_it_is_one(parse, words: list[str], wanted: str) -> None:
    said = rf" is a switch and takes no value; write {wanted}$"
    with pytest.raises(UserError, match=said):
        parse(words)


def test_a_switch_before_an_image_is_no_switch_with_a_value(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1").touch()
    assert parse_predict(["run", "--use-gpu", "1"]).images == ("1",)
    with pytest.raises(UserError, match="--use-gpu on: --use-gpu is a switch"):
        parse_predict(["run", "a.png", "--use-gpu", "on"])


# A notebook, whose process outlives a run


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_on_ray_in_a_notebook_leaves_no_variables_behind(tmp_path: Path, monkeypatch) -> None:
    config = with_absolute_paths(
        TrainConfig(dataset="digits", num_workers="1:2", storage_path=str(tmp_path), name="a")
    )
    names = ray_settings(config).keys()
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")  # a person's own choice
    before = dict(os.environ)
    seen: list[dict[str, str]] = []

    def look(event: Event) -> None:
        seen.append(dict(os.environ))

    run = RunDirectory.create(config)
    ended = train_on_ray(config, run, "", {}, RestartCounter(look), worker=started)
    assert ended is None
    assert seen[0].keys() - before.keys() == names - before.keys()
    assert seen[0]["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "1"
    assert dict(os.environ) == before


def started(work: Work) -> None:
    """Only report that a worker runs."""
    ray.get(work.coordinator.put.remote(Started(1, None)))


def test_a_run_in_a_notebook_without_ray_leaves_no_variables_behind(
    tmp_path: Path, few_digits: Path, monkeypatch
) -> None:
    monkeypatch.setenv("PL_TRAINER_MAX_STEPS", "1")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    set_deterministic(True)  # its variable has to be there before the first product on a GPU
    before = dict(os.environ)
    with small_network(Small):
        train(few(few_digits, tmp_path, max_epochs=1))
    assert dict(os.environ) == before


def test_a_run_in_a_notebook_that_fails_leaves_no_variables_behind(
    tmp_path: Path, few_digits: Path, monkeypatch
) -> None:
    def fail(event: Event) -> None:
        raise KeyError

    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with small_network(Small), pytest.raises(KeyError):
        train(few(few_digits, tmp_path, max_epochs=1), fail)
    assert "PYTHONHASHSEED" not in os.environ
