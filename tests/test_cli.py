"""The command line without training: help, precedence, refusals."""

import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist.cli import parse_train, parse_tune
from cifar_dist.errors import UserError
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.search.space import searched_space
from tests.conftest import ROOT
from tests.processes import PATIENCE_S

HELP = """
import sys
from cifar_dist.exits import run_command
import runpy
command = sys.argv[1]
sys.argv = [command, "--help"]
try:
    runpy.run_module(f"cifar_dist.{command}", run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0, stop.code
loaded = {"torch", "ray", "lightning", "torchvision", "pandas"} & set(sys.modules)
assert not loaded, loaded
"""


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("train", ["--num-workers", "--use-gpu", "--config", "--preset", "--weight-decay"]),
        (
            "tune",
            ["--space", "--num-samples", "--max-epochs", "--grace-period", "--reduction-factor",
             "--metric", "--search", "--scheduler", "--workers-per-trial", "--use-gpu",
             "--gpus-per-trial", "--cpus-per-trial", "--max-concurrent", "--time-budget",
             "--resume", "--weight-decay"],
        ),
    ],
)  # fmt: skip
def test_help_loads_neither_torch_nor_ray(command: str, flags: list[str]) -> None:
    words = [sys.executable, "-c", HELP, command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    for flag in flags:
        assert flag in done.stdout


@pytest.mark.parametrize("command", ["train", "tune", "evaluate", "predict", "export"])
def test_help_takes_under_a_second(command: str) -> None:
    def cpu_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def once() -> float:
        before = cpu_seconds()
        words = [sys.executable, "-m", f"cifar_dist.{command}", "--help"]
        subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
        return cpu_seconds() - before

    # Of the processor, which other processes of a busy machine take little from; the median, since
    # the first call may compile bytecode.
    assert statistics.median(once() for _ in range(5)) < 1.0


def test_flags_override_file_overrides_preset_overrides_defaults(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("preset: cifar\nlr: 0.3\nseed: 5\n")
    config = parse_train(["--config", str(file), "--seed", "6"])
    assert (config.stem, config.lr, config.seed, config.gamma) == ("cifar", 0.3, 6, 0.5)


def test_a_preset_takes_any_length_and_schedule() -> None:
    assert parse_train(["--preset", "cifar", "--max-epochs", "1"]).max_epochs == 1
    assert parse_train(["--preset", "cifar", "--schedule", "steplr"]).schedule == "steplr"


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


def test_a_typed_setting_stays_where_the_data_set_would_have_another() -> None:
    assert parse_train(["--flip", "0.5", "--dataset", "digits"]).flip == 0.5
    assert parse_train(["--dataset", "digits"]).flip == 0
    assert parse_tune(["--flip", "0.5", "--dataset", "digits"]).train.flip == 0.5


def test_a_files_setting_stays_where_the_data_set_would_have_another(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("flip: 0.5\n")
    assert parse_train(["--config", str(file), "--dataset", "digits"]).flip == 0.5
    assert parse_tune(["--config", str(file), "--dataset", "digits"]).train.flip == 0.5


def test_what_a_runs_own_file_derived_follows_from_flags(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(parse_train([]).to_yaml())
    assert parse_train(["--config", str(file), "--dataset", "digits"]).flip == 0
    assert parse_tune(["--config", str(file), "--dataset", "digits"]).train.flip == 0
    assert parse_train(["--config", str(file), "--use-gpu"]).gpus_per_worker == 1
    file.write_text(parse_train(["--use-gpu", "--flip", "0.5"]).to_yaml())
    assert parse_train(["--config", str(file), "--no-use-gpu"]).gpus_per_worker == 0
    assert parse_train(["--config", str(file), "--dataset", "digits"]).flip == 0.5


def test_a_file_of_version_0_1_0_may_be_run_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("dataset: cifar10\nuse_gpu: false\ngpus_per_worker: 0.0\nflip: 0.5\n")
    config = parse_train(["--config", str(file), "--use-gpu", "--dataset", "digits"])
    assert (config.gpus_per_worker, config.flip) == (1, 0.5)


def test_a_resumed_run_may_move_to_a_gpu_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--use-gpu"]):
        name = f"run{len(flags)}"
        config = parse_train(["--name", name, *flags])
        RunDirectory.create(config).write_config(config)
        resume = ["--name", name, "--resume"]
        assert parse_train(resume).gpus_per_worker == len(flags)
        for use_gpu, gpus in (("--use-gpu", 1), ("--no-use-gpu", 0)):
            config = parse_train([*resume, use_gpu])
            assert (config.use_gpu, config.gpus_per_worker) == (bool(gpus), gpus)
            RunDirectory.existing(config)


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


def test_a_typed_setting_is_fixed_and_a_files_is_not(tmp_path: Path) -> None:
    file = tmp_path / "best.yaml"
    file.write_text(parse_train(["--dataset", "digits", "--lr", "0.01"]).to_yaml())
    config = parse_tune(["--config", str(file), "--gamma=0.3", "--no-compile"])
    assert (config.train.lr, config.train.gamma, config.train.max_epochs) == (0.01, 0.3, 30)
    assert list(searched_space(config).domains) == ["lr", "weight_decay", "step_size"]
    assert parse_tune([]).train.max_epochs == 9


def test_the_best_trials_file_may_be_run_on_other_data_and_devices(tmp_path: Path) -> None:
    config = parse_tune(["--use-gpu", "--workers-per-trial", "2"])
    drawn = {"lr": 0.1, "weight_decay": 0.1, "step_size": 3, "gamma": 0.5}
    best = searched_space(config).configured(config.trial_base, drawn)
    file = tmp_path / "best.yaml"
    file.write_text(best.to_yaml())
    again = parse_train(["--config", str(file), "--no-use-gpu", "--dataset", "digits"])
    assert (again.lr, again.num_workers, again.gpus_per_worker, again.flip) == (0.1, 2, 0, 0)


def test_a_searchs_file_holds_settings_of_search_and_trials(tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text("dataset: digits\nnum_samples: 3\npreset: cifar\n")
    config = parse_tune(["--config", str(file), "--num-samples", "4"])
    assert (config.num_samples, config.train.stem, config.train.dataset) == (4, "cifar", "digits")
    file.write_text("num_sample: 3\n")
    with pytest.raises(UserError, match=r"num_sample \(in .*\): did you mean num_samples"):
        parse_tune(["--config", str(file)])


def test_a_search_that_is_resumed_takes_its_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_tune(["--name", "s", "--dataset", "digits", "--max-epochs", "3"])
    SearchDirectory.create(config, searched_space(config))
    resumed = parse_tune(["--name", "s", "--resume", "--num-samples", "20", "--num-workers", "2"])
    assert (resumed.train.max_epochs, resumed.num_samples, resumed.workers) == (3, 20, 2)
    assert (resumed.cpus_per_trial, resumed.gpus_per_trial, resumed.train.flip) == (2, 0, 0)
    on_gpus = parse_tune(["--name", "s", "--resume", "--use-gpu", "--workers-per-trial", "2"])
    assert (on_gpus.gpus_per_trial, on_gpus.trial_base.gpus_per_worker) == (2, 1)
    SearchDirectory.existing(on_gpus).write_config(on_gpus)
    assert parse_tune(["--name", "s", "--resume", "--num-workers", "3"]).workers == 2
    assert parse_tune(["--name", "s", "--resume", "--no-use-gpu"]).gpus_per_trial == 0
    with pytest.raises(UserError, match=r"--config my\.yaml: --resume keeps the settings"):
        parse_tune(["--name", "s", "--resume", "--config", "my.yaml"])
    train = parse_train(["--name", "r"])
    RunDirectory.create(train).write_config(train)
    with pytest.raises(UserError, match="holds a run, not a search"):
        parse_tune(["--name", "r", "--resume"])
