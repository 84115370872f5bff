"""The command line without training: help, precedence, refusals."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cifar_dist.cli import parse_train
from cifar_dist.errors import UserError
from cifar_dist.runs import RunDirectory
from tests.conftest import ROOT

HELP = """
import sys
from cifar_dist.cli import run_command
import runpy
sys.argv = ["train", "--help"]
try:
    runpy.run_module("cifar_dist.train", run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0, stop.code
loaded = {"torch", "ray", "lightning", "torchvision", "pandas"} & set(sys.modules)
assert not loaded, loaded
"""


def test_help_loads_neither_torch_nor_ray() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for flag in ("--num-workers", "--use-gpu", "--config", "--preset", "--weight-decay"):
        assert flag in done.stdout


def test_help_takes_under_a_second() -> None:
    def once() -> float:
        began = time.monotonic()
        words = [sys.executable, "-m", "cifar_dist.train", "--help"]
        subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
        return time.monotonic() - began

    # The median, since the first call may compile bytecode and the machine may be busy.
    assert statistics.median(once() for _ in range(5)) < 1.0


def test_flags_override_file_overrides_preset_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("preset: cifar\nlr: 0.3\nseed: 5\n")
    config = parse_train(["--config", str(file), "--seed", "6"])
    assert (config.stem, config.lr, config.seed, config.gamma) == ("cifar", 0.3, 6, 0.5)


def test_what_follows_from_a_flag_follows_from_it_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("lr: 0.3\n")
    config = parse_train(["--config", str(file), "--use-gpu", "--dataset=digits"])
    assert (config.gpus_per_worker, config.flip) == (1, 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lrr", "1"], "unknown flag --lrr: did you mean --lr?"),
        (["--learn-fast"], "unknown flag --learn-fast"),
        (["faster"], "unexpected word 'faster'"),
        (["--lr", "abc"], "--lr"),
        (["--lr"], "--lr"),
        (["--config"], "--config"),
        (["--config", "missing.yaml"], "--config missing.yaml: cannot be read"),
        (["--dataset", "mnist"], "'mnist'"),
        (["--batch-size", "0.5"], "--batch-size"),
        (["--preset", "fast"], "--preset fast"),
        (["--resume"], "--resume: say which run"),
        (["--resume", "--name", "none-such"], "there is no run in"),
    ],
)
def test_bad_words_are_refused_in_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_train(words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "│" not in str(caught.value)


def test_a_misspelt_key_names_file_and_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("weight_decy: 0.1\n")
    with pytest.raises(UserError, match=r"weight_decy \(in .*yaml\): did you mean weight_decay"):
        parse_train(["--config", str(file)])


def test_a_bad_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("lr: -1\n")
    with pytest.raises(UserError, match=r"--lr -1.0: .* \(in .*settings.yaml\)"):
        parse_train(["--config", str(file)])


def test_a_runs_own_file_may_be_run_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(parse_train(["--dataset", "digits"]).to_yaml())
    assert parse_train(["--config", str(file), "--use-gpu"]).gpus_per_worker == 1
    assert parse_train(["--config", str(file), "--dataset", "cifar10"]).flip == 0.5
    file.write_text(parse_train(["--use-gpu"]).to_yaml())
    assert parse_train(["--config", str(file), "--no-use-gpu"]).gpus_per_worker == 0


def test_a_preset_that_a_file_overrules_wholly_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(parse_train([]).to_yaml())
    with pytest.raises(UserError, match=r"--preset cifar: .* sets everything that it would"):
        parse_train(["--preset", "cifar", "--config", str(file)])
    file.write_text("resume: true\nname: first\n")
    with pytest.raises(UserError, match="type --resume instead"):
        parse_train(["--config", str(file)])


def test_flags_with_resume_are_checked_against_the_run_that_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_train(["--name", "big", "--batch-size", "1024", "--use-gpu"])
    RunDirectory.create(config).write_config(config)
    resume = ["--name", "big", "--resume"]
    assert parse_train([*resume, "--num-workers", "100"]).batch_size == 1024
    assert parse_train([*resume, "--gpus-per-worker", "0.5"]).gpus_per_worker == 0.5
    with pytest.raises(UserError, match=r"--config my\.yaml: --resume keeps the settings"):
        parse_train([*resume, "--config", "my.yaml"])
