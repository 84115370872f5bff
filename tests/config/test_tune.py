"""A search's settings: what follows from what, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifar_dist.config.files import read_settings
from cifar_dist.config.train import with_absolute_paths
from cifar_dist.config.tune import TuneConfig, check_same_search, make_tune_config
from cifar_dist.errors import UserError
from cifar_dist.search.space import searched_space


def test_defaults_are_a_laptops() -> None:
    config = TuneConfig()
    assert (config.workers, config.cpus_per_trial, config.gpus_per_trial) == (1, 1, 0)
    assert (config.num_samples, config.grace_period, config.reduction_factor) == (16, 1, 3)
    assert (config.train.max_epochs, config.mode) == (9, "max")
    assert make_tune_config({}) == config
    searched_space(config)


def test_a_trials_resources_are_shared_by_its_workers() -> None:
    config = make_tune_config({"workers_per_trial": 2, "cpus_per_trial": 6})
    assert (config.trial_base.num_workers, config.trial_base.cpus_per_worker) == (2, 3)
    config = make_tune_config({"num_workers": 2, "use_gpu": True, "gpus_per_trial": 0.5})
    assert config.workers == 2
    assert config.trial_base.gpus_per_worker == 0.25
    assert make_tune_config({"use_gpu": True}).gpus_per_trial == 1


@pytest.mark.parametrize(
    ("text", "seconds"), [("600", 600), ("90s", 90), ("1.5m", 90), ("8h", 28_800), (45, 45)]
)
def test_time_budgets_have_units(text, seconds: float) -> None:
    assert make_tune_config({"time_budget": text}).time_budget_s == seconds


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_samples": 0}, "--num-samples 0: must be from 1 to 9999 trials"),
        ({"metric": "accuracy"}, "--metric 'accuracy': must be val_accuracy or val_loss"),
        ({"time_budget": "soon"}, "--time-budget soon: must be seconds above 0"),
        ({"time_budget": "0"}, "--time-budget 0: must be seconds above 0"),
        ({"time_budget": -5}, "--time-budget -5: must be"),
        ({"grace_period": 10}, "--grace-period 10: is above --max-epochs 9"),
        ({"grace_period": 0}, "--grace-period 0: must be 1 epoch"),
        ({"reduction_factor": 1}, "--reduction-factor 1.0: must be above 1"),
        ({"max_concurrent": 0}, "--max-concurrent 0: must be 1 trial"),
        ({"workers_per_trial": 0}, "--workers-per-trial 0: must be 1 worker"),
        ({"num_workers": "1:2"}, "--num-workers 1:2: a trial keeps its number of workers"),
        ({"gpus_per_trial": 1}, "--gpus-per-trial 1: add --use-gpu"),
        (
            {"use_gpu": True, "gpus_per_trial": 1.5},
            "--gpus-per-trial 1.5: is 1.5 for each of 1 work",
        ),
        (
            {"use_gpu": True, "gpus_per_trial": 3, "workers_per_trial": 2},
            "--gpus-per-trial 3: is 1.5 for each of 2 workers, and Ray gives whole GPUs or a "
            "part of one; use 2 or 4",
        ),
        ({"use_gpu": True, "gpus_per_worker": 2.5}, "--gpus-per-worker 2.5: Ray gives whole GPUs"),
        ({"use_gpu": True, "gpus_per_trial": 0}, "contradicts --use-gpu"),
        ({"batch_size": 2, "workers_per_trial": 2}, "2 workers need at least 2 images each"),
        ({"num_sample": 3}, "unknown setting num_sample: did you mean num_samples"),
        ({"scheduler": "hyperband"}, "must be asha or none"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        make_tune_config(settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_read_back_as_the_same_config(tmp_path: Path) -> None:
    config = make_tune_config({"dataset": "digits", "preset": "cifar", "time_budget": "8h"})
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    again = make_tune_config(read_settings(file))
    absolute = config.replace(train=with_absolute_paths(config.train))
    assert (again, again.given()) == (absolute, absolute.given())
    assert "\nworkers_per_trial: null  # 1: follows from num_workers\n" in file.read_text()
    assert "\nflip: null  # 0.0: follows from the data set\n" in file.read_text()


def test_a_fixed_setting_is_not_searched() -> None:
    config = make_tune_config({"lr": 0.1}, fixed=("lr", "dataset"))
    assert list(searched_space(config).domains) == ["weight_decay", "step_size", "gamma"]


def test_a_resumed_search_computes_what_was_started() -> None:
    started = make_tune_config({"dataset": "digits"})
    check_same_search(started, make_tune_config({"dataset": "digits", "num_samples": 20}))
    check_same_search(started, make_tune_config({"dataset": "digits", "max_concurrent": 1}))
    with pytest.raises(UserError, match="--max-epochs 3: the search was started with 9"):
        check_same_search(started, make_tune_config({"dataset": "digits", "max_epochs": 3}))
    with pytest.raises(UserError, match="--num-samples 8: the search was started with 16"):
        check_same_search(started, make_tune_config({"dataset": "digits", "num_samples": 8}))


def test_resources_follow_again_in_a_changed_search() -> None:
    def changed(given: dict, **changes) -> TuneConfig:
        return make_tune_config({**make_tune_config(given).given(), **changes})

    again = changed({"dataset": "digits"}, num_workers=2, use_gpu=True)
    assert (again.workers, again.cpus_per_trial, again.gpus_per_trial) == (2, 2, 2)
    again = changed({"workers_per_trial": 2}, num_workers=3, cpus_per_worker=4)
    assert (again.workers, again.cpus_per_trial) == (2, 8)
    # Given, though it equals what would follow.
    assert changed({"workers_per_trial": 1}, num_workers=3).workers == 1
    config = make_tune_config({"num_workers": 2})
    again = config.replace(train=config.train.replace(num_workers=3), num_samples=4)
    assert (again.workers, again.cpus_per_trial, again.num_samples) == (3, 3, 4)


def test_a_trial_derives_what_its_search_derived() -> None:
    base = make_tune_config({"use_gpu": True, "workers_per_trial": 2}).trial_base
    assert base.given()["gpus_per_worker"] is None
    assert base.given()["flip"] is None
    assert base.replace(use_gpu=False).gpus_per_worker == 0
    base = make_tune_config({"use_gpu": True, "gpus_per_trial": 0.5, "flip": 0.5}).trial_base
    assert (base.given()["gpus_per_worker"], base.given()["flip"]) == (0.5, 0.5)
