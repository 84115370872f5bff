"""Settings: defaults, checks, YAML."""

import copy
import dataclasses
import pickle
from pathlib import Path

import pytest

from cifar_dist.config.checks import check_image_side
from cifar_dist.config.files import read_settings
from cifar_dist.config.presets import PRESETS
from cifar_dist.config.train import (
    TrainConfig,
    make_config,
    setting_names,
    with_absolute_paths,
)
from cifar_dist.errors import UserError


def test_defaults_are_the_notebooks() -> None:
    config = TrainConfig()
    assert (config.lr, config.weight_decay, config.optimizer) == (1e-3, 1e-2, "adamw")
    assert (config.step_size, config.gamma, config.schedule) == (10, 0.5, "steplr")
    assert (config.batch_size, config.max_epochs, config.num_workers) == (128, 30, 1)
    assert (config.crop_padding, config.flip, config.cutout) == (4, 0.5, 0)
    assert (config.stem, config.weights, config.image_size) == ("imagenet", "none", 32)
    assert (config.seed, config.deterministic, config.precision) == (0, True, "32")


def test_digits_are_not_mirrored() -> None:
    assert TrainConfig(dataset="digits").flip == 0
    assert TrainConfig(dataset="digits", flip=0.25).flip == 0.25


def test_a_gpu_each_follows_from_use_gpu() -> None:
    assert TrainConfig().gpus_per_worker == 0
    assert TrainConfig(use_gpu=True).gpus_per_worker == 1
    assert TrainConfig(use_gpu=True, gpus_per_worker=0.5).gpus_per_worker == 0.5


def test_data_dir_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_DIST_DATA", "/somewhere")
    assert TrainConfig().data_dir == "/somewhere"
    monkeypatch.delenv("CIFAR_DIST_DATA")
    assert TrainConfig().data_dir == "data"


def test_what_was_derived_follows_again_in_a_changed_config() -> None:
    config = TrainConfig()
    assert config.replace(dataset="digits").flip == 0
    assert config.replace(dataset="digits").replace(dataset="cifar10").flip == 0.5
    assert config.replace(use_gpu=True).gpus_per_worker == 1
    assert config.replace(use_gpu=True).replace(use_gpu=False, lr=0.1).gpus_per_worker == 0
    given = TrainConfig(flip=0.5, use_gpu=True, gpus_per_worker=0.5)
    assert given.replace(dataset="digits").flip == 0.5
    assert given.replace(gpus_per_worker=None).gpus_per_worker == 1
    with pytest.raises(UserError, match=r"--gpus-per-worker 0\.5: add --use-gpu"):
        given.replace(use_gpu=False)


def test_which_settings_were_given_is_remembered_and_not_compared() -> None:
    config = TrainConfig(flip=0.5)
    assert (config.given()["flip"], config.given()["gpus_per_worker"]) == (0.5, None)
    assert set(config.derived()) == {"data_dir", "gpus_per_worker"}
    for same in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert same.given() == config.given()
    assert TrainConfig() == config
    assert TrainConfig().to_dict() == config.to_dict()
    assert TrainConfig().given()["flip"] is None
    assert make_config(TrainConfig().given()).given() == TrainConfig().given()


def test_presets_supply_defaults_that_settings_override() -> None:
    assert make_config({"preset": "notebook"}).weights == "imagenet"
    cifar = make_config({"preset": "cifar", "lr": 0.3})
    assert (cifar.stem, cifar.schedule, cifar.lr) == ("cifar", "onecycle", 0.3)
    assert (cifar.max_epochs, make_config({"preset": "cifar-long"}).max_epochs) == (15, 60)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("use_gpu", [False, True])
def test_every_preset_makes_a_config(preset: str, use_gpu: bool) -> None:
    config = make_config({"preset": preset, "use_gpu": use_gpu})
    assert config.to_dict().items() >= PRESETS[preset].items()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": -1}, "--lr -1.0: must be greater than 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"lr": "fast"}, "--lr 'fast': must be a number"),
        ({"lr": True}, "--lr True: must be a number"),
        ({"batch_size": 0.5}, "--batch-size 0.5: must be a whole number"),
        ({"use_gpu": 1}, "--use-gpu 1: must be true or false"),
        ({"dataset": "mnist"}, "--dataset 'mnist': must be cifar10 or cifar100 or digits"),
        ({"flip": 1.5}, "--flip 1.5: must be a probability"),
        ({"num_workers": "4:1"}, "--num-workers 4:1: a range is MIN:MAX"),
        ({"num_workers": "0:2"}, "--num-workers 0:2: a range is MIN:MAX"),
        ({"num_workers": -1}, "--num-workers -1"),
        ({"batch_size": 6, "num_workers": 4}, "4 workers need at least 2 images each, 8 in all"),
        ({"gpus_per_worker": 1}, "--gpus-per-worker 1: add --use-gpu"),
        (
            {"use_gpu": True, "gpus_per_worker": 1.5},
            "--gpus-per-worker 1.5: Ray gives whole GPUs or a part of one; use 1 or 2",
        ),
        ({"precision": "16-mixed"}, "--precision 16-mixed: needs --use-gpu"),
        ({"name": "../x"}, "--name ../x: must be letters"),
        ({"resume": True}, "--resume: say which run"),
        (
            {"storage_path": "ftp://host/runs"},
            "--storage-path ftp://...: is no known kind of store",
        ),
        ({"wait_for_resources": "soon"}, "--wait-for-resources soon: must be seconds"),
        ({"weight_decy": 0.1}, "unknown setting weight_decy: did you mean weight_decay?"),
        ({"ema": 1.0}, "--ema 1.0: must be a decay from 0 to below 1"),
        ({"final_lr_factor": -0.1}, "--final-lr-factor -0.1: must be a share from 0 to 1"),
        ({"crop_padding_mode": "edge"}, "--crop-padding-mode 'edge': must be constant or reflect"),
        ({"warmup_epochs": 2}, "--warmup-epochs 2: --schedule steplr has no warm-up"),
        (
            {"schedule": "onecycle", "warmup_epochs": float("inf")},
            "--warmup-epochs inf: must be 0 epochs or more",
        ),
        (
            {"preset": "cifar", "max_epochs": 3, "warmup_epochs": 3},
            "--warmup-epochs 3: must be below --max-epochs 3",
        ),
        ({"preset": "fast"}, "--preset fast: choose from notebook, cifar, cifar-long"),
    ],
)
def test_bad_settings_say_what_and_what_to_do(settings: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config(settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "side", "said"),
    [
        ({"crop_padding": 33}, 32, "--crop-padding 33: images are 32 pixels wide; lower it"),
        ({"crop_padding": 9}, 8, "--crop-padding 9: images are 8 pixels wide; lower it"),
        (
            {"crop_padding": 32, "crop_padding_mode": "reflect"},
            32,
            "--crop-padding 32: --crop-padding-mode reflect has 31 pixels to show",
        ),
    ],
)
def test_settings_that_do_not_fit_the_images_are_refused(settings, side: int, said: str) -> None:
    config = TrainConfig(**settings)
    with pytest.raises(UserError, match=said):
        check_image_side(config, side)
    check_image_side(config, side + 1)


def test_a_crop_as_wide_as_the_images_is_not() -> None:
    check_image_side(TrainConfig(crop_padding=32), 32)
    check_image_side(TrainConfig(crop_padding=31, crop_padding_mode="reflect"), 32)


def test_yaml_reads_back_to_the_same_config(tmp_path) -> None:
    config = TrainConfig(num_workers="1:4", lr=3e-7, dataset="digits", name="a", cutout=8)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert set(read_settings(file)) == set(setting_names())
    again = make_config(read_settings(file))
    assert again == with_absolute_paths(config)
    assert again.given() == with_absolute_paths(config).given()


def test_yaml_shows_the_value_of_what_follows_and_derives_it_again(tmp_path: Path) -> None:
    text = TrainConfig(dataset="digits", use_gpu=True).to_yaml()
    assert "\nflip: null  # 0.0: follows from the data set\n" in text
    assert "\ngpus_per_worker: null  # 1.0: follows from use_gpu\n" in text
    file = tmp_path / "config.yaml"
    file.write_text(text)
    again = make_config({**read_settings(file), "dataset": "cifar10", "use_gpu": False})
    assert (again.flip, again.gpus_per_worker) == (0.5, 0)
    file.write_text(TrainConfig(flip=0.5).to_yaml())
    assert make_config({**read_settings(file), "dataset": "digits"}).flip == 0.5


def test_the_data_of_a_yaml_file_do_not_depend_on_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIFAR_DIST_DATA", "images")
    file = tmp_path / "config.yaml"
    file.write_text(TrainConfig().to_yaml())
    monkeypatch.setenv("CIFAR_DIST_DATA", "/elsewhere")
    monkeypatch.chdir("/")
    assert make_config(read_settings(file)).data_dir == str(tmp_path / "images")


def test_yaml_numbers_mean_what_they_look_like(tmp_path) -> None:
    # YAML 1.1, which PyYAML follows, reads the text "1e-3" and the number 64 here.
    file = tmp_path / "config.yaml"
    file.write_text("lr: 1e-3\nnum_workers: 1:4\nweight_decay: .5\nseed: 7\nuse_gpu: false\n")
    assert read_settings(file) == {
        "lr": 0.001,
        "num_workers": "1:4",
        "weight_decay": 0.5,
        "seed": 7,
        "use_gpu": False,
    }


@pytest.mark.parametrize("text", ["- lr", "lr: [", "\xff"])
def test_a_file_that_holds_no_settings_is_refused(tmp_path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="--config"):
        read_settings(file)


def test_every_setting_is_documented_and_checked_by_type() -> None:
    for field in dataclasses.fields(TrainConfig):
        with pytest.raises(UserError):
            TrainConfig(**{field.name: object()})


def test_whole_numbers_in_files_are_decimal(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("seed: 08\nmax_epochs: 010\n")
    assert read_settings(tmp_path / "my.yaml") == {"seed": 8, "max_epochs": 10}


@pytest.mark.parametrize(
    ("every", "epochs", "steps"), [(1, 1, None), ("3", 3, None), ("200s", None, 200)]
)
def test_checkpoints_are_counted_in_epochs_or_steps(every, epochs, steps) -> None:
    config = TrainConfig(checkpoint_every=every)
    assert (config.checkpoint_epochs, config.checkpoint_steps) == (epochs, steps)
    assert make_config({**config.to_dict()}) == config


@pytest.mark.parametrize("every", [0, "0s", "s", "s200", "200S", "1.5", "-1", "", "200 s"])
def test_other_distances_between_checkpoints_are_refused(every) -> None:
    with pytest.raises(UserError, match=r"--checkpoint-every .*must be a number of epochs"):
        TrainConfig(checkpoint_every=every)
