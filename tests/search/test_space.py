"""Spaces as data: what is refused, and what is drawn."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cifar_dist.config.train import TrainConfig
from cifar_dist.errors import UserError
from cifar_dist.search.space import Space, known_spaces, read_space

BASE = TrainConfig(dataset="digits")


def space_of(folder: Path, text: str) -> Space:
    file = folder / "my.yaml"
    file.write_text(text)
    return read_space(str(file))


def test_installed_spaces_are_found_by_name_and_could_run() -> None:
    assert known_spaces() == ["adamw_steplr", "augmentation", "sgd_onecycle"]
    for name in known_spaces():
        space = read_space(name)
        space.check(BASE)
        for drawn in space.draws(seed=0, num_samples=50):
            space.configured(BASE, drawn)
    assert list(read_space("adamw_steplr").domains) == ["lr", "weight_decay", "step_size", "gamma"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("lrr: {uniform: [0, 1]}", r"unknown setting lrr \(in .*my.yaml\): did you mean lr"),
        ("num_workers: {choice: [1, 2]}", "num_workers .*is not searched; searched are batch_size"),
        ("lr: 0.1", "lr 0.1 .*must be one of choice"),
        ("lr: {logunifrom: [1e-4, 1]}", "unknown kind logunifrom of lr .*did you mean loguniform"),
        ("lr: {loguniform: [0, 1]}", r"lr: loguniform \[0, 1\] .*both greater than 0"),
        ("lr: {uniform: [1, 0.1]}", "low below high"),
        ("lr: {uniform: [1]}", r"must be \[low, high\]"),
        ("lr: {uniform: [a, b]}", r"must be \[low, high\]"),
        ("lr: {choice: []}", "must be a list of values"),
        ("step_size: {randint: [1.5, 3]}", "whole numbers"),
        ("label_smoothing: {quniform: [0, 0.2, 0]}", r"\[low, high, step\]"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_file_and_key(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(UserError, match=said) as caught:
        space_of(tmp_path, text)
    assert "my.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "lr: {uniform: [-1, 1]}",
        "batch_size: {choice: [128, 1]}",
        "step_size: {randint: [0, 3]}",
        "step_size: {uniform: [1, 3]}",
        "cutout: {choice: [64]}",
        "optimizer: {grid: [adamw, adam]}",
    ],
)
def test_values_that_no_trial_could_run_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"\(in .*my.yaml: ") as caught:
        space_of(tmp_path, text).check(BASE)
    assert "\n" not in str(caught.value)


def test_a_cycle_and_its_warm_up_are_searched_together(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        "warmup_epochs: {uniform: [0.5, 5]}\nschedule: {choice: [onecycle]}\n"
        "anneal: {choice: [cosine, linear]}\nfinal_lr_factor: {choice: [0, 1e-2]}\n"
        "ema: {choice: [0, 0.99]}\ndecay_norm_bias: {choice: [true, false]}\n"
        "crop_padding_mode: {choice: [constant, reflect]}\n",
    )
    space.check(BASE)
    for drawn in space.draws(seed=0, num_samples=20):
        assert space.configured(BASE, drawn).ema == drawn["ema"]


def test_a_misspelt_space_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown space adamw_steplt .*did you mean adamw_steplr"):
        read_space("adamw_steplt")
    with pytest.raises(UserError, match=r"--space missing.yaml: cannot be read"):
        read_space("missing.yaml")


def test_a_draw_depends_on_seed_and_number_alone() -> None:
    space = read_space("adamw_steplr")
    few, many = list(space.draws(3, 4)), list(space.draws(3, 12))
    assert many[:4] == few
    assert list(space.draws(4, 4)) != few
    assert len({repr(drawn) for drawn in many}) == 12


def test_draws_stay_in_their_bounds_and_reach_towards_them(tmp_path: Path) -> None:
    space = space_of(
        tmp_path,
        "lr: {loguniform: [1e-4, 1e-2]}\ngamma: {uniform: [0.2, 0.4]}\n"
        "label_smoothing: {quniform: [0.0, 0.2, 0.05]}\nstep_size: {randint: [2, 5]}\n"
        "batch_size: {quniform: [64, 128, 32]}\n",
    )
    drawn = list(space.draws(0, 2000))
    lrs = sorted(each["lr"] for each in drawn)
    assert lrs[0] >= 1e-4
    assert lrs[-1] <= 1e-2
    # Half of the draws lie on either side of the geometric mean.
    assert 900 < sum(lr < 1e-3 for lr in lrs) < 1100
    assert {each["label_smoothing"] for each in drawn} == {0.0, 0.05, 0.1, 0.15, 0.2}
    assert {each["step_size"] for each in drawn} == {2, 3, 4}
    assert {each["batch_size"] for each in drawn} == {64, 96, 128}
    assert all(isinstance(each["batch_size"], int) for each in drawn)
    space.configured(BASE, drawn[0])


def test_grid_values_are_all_taken(tmp_path: Path) -> None:
    space = space_of(tmp_path, "lr: {uniform: [0.1, 0.2]}\ncutout: {grid: [0, 4, 8]}\n")
    drawn = list(space.draws(0, 2))
    assert [each["cutout"] for each in drawn] == [0, 4, 8, 0, 4, 8]
    assert len({each["lr"] for each in drawn}) == 6
    with pytest.raises(UserError, match=r"--search grid: lr .*is uniform"):
        space.combinations()
    listed = space_of(tmp_path, "lr: {choice: [0.1, 0.2]}\ncutout: {grid: [0, 4]}\n")
    assert [tuple(each.values()) for each in listed.combinations()] == list(
        itertools.product([0.1, 0.2], [0, 4])
    )


def test_what_is_fixed_is_not_searched() -> None:
    space = read_space("adamw_steplr").without(("lr", "gamma"))
    assert list(space.domains) == ["weight_decay", "step_size"]
    with pytest.raises(UserError, match="--weight-decay, --step-size: nothing is left"):
        space.without(("weight_decay", "step_size"))
