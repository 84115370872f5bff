"""Settings that other versions wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from cifar_dist import __version__
from cifar_dist.config.train import make_config, setting_names
from cifar_dist.config.tune import make_tune_config
from cifar_dist.config.versions import as_given, own_settings
from cifar_dist.errors import UserError

OF_A_RUN = {"dataset": "cifar10", "num_workers": 1, "use_gpu": False, "cpus_per_worker": 1.0,
            "gpus_per_worker": 0.0, "flip": 0.5}  # fmt: skip
"""As version 0.1.0 wrote them: every setting with the value that it had."""
OF_A_SEARCH = {"workers_per_trial": 2, "cpus_per_trial": 3.0, "gpus_per_trial": 0.0, **OF_A_RUN,
               "num_workers": 2, "cpus_per_worker": 1.5}  # fmt: skip


def test_resources_of_version_0_1_0_follow_again_and_the_rest_was_given() -> None:
    given = make_config(as_given(OF_A_RUN))
    assert given.replace(use_gpu=True).gpus_per_worker == 1
    assert given.replace(dataset="digits").flip == 0.5
    half = as_given({**OF_A_RUN, "use_gpu": True, "gpus_per_worker": 0.5})
    assert half["gpus_per_worker"] == 0.5


def test_a_searchs_resources_of_version_0_1_0_follow_again() -> None:
    follows = as_given(OF_A_SEARCH)
    names = ("workers_per_trial", "cpus_per_trial", "gpus_per_trial", "gpus_per_worker")
    assert [follows[name] for name in names] == [None] * 4
    again = make_tune_config({**follows, "num_workers": 4, "use_gpu": True})
    assert (again.workers, again.cpus_per_trial, again.gpus_per_trial) == (4, 6, 4)
    given = as_given({**OF_A_SEARCH, "workers_per_trial": 1, "cpus_per_trial": 4.0})
    assert (given["workers_per_trial"], given["cpus_per_trial"]) == (1, 4)


def test_later_files_and_files_of_ones_own_mean_what_they_say() -> None:
    for later in (
        {**OF_A_RUN, "flip": None},
        {**OF_A_SEARCH, "cpus_per_trial": None},
        {"gpus_per_worker": 0.0},
        {"flip": "x", "gpus_per_worker": None},
    ):
        assert as_given(later) == later


def test_a_setting_that_a_run_did_not_have_is_the_default_and_not_its_presets(
    tmp_path: Path,
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("preset: cifar\nschedule: onecycle\n")
    config = make_config(own_settings(file, setting_names()))
    assert (config.schedule, config.ema, config.lr) == ("onecycle", 0, 1e-3)


def test_a_newer_versions_setting_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("lr: 0.1\nweight_decya: 0.1\n")
    with pytest.raises(UserError) as caught:
        own_settings(file, setting_names())
    assert str(caught.value) == (
        f"{file}: the setting weight_decya is unknown to this version, {__version__}; use the "
        "newer version of cifar_dist that wrote the file"
    )
