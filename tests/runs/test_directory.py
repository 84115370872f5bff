"""The run directory."""

from pathlib import Path

import pytest
import yaml

from cifar_dist.config.model import EvaluateConfig
from cifar_dist.config.train import TrainConfig, with_absolute_paths
from cifar_dist.config.tune import TuneConfig
from cifar_dist.errors import UserError
from cifar_dist.inference.lookup import weights_file
from cifar_dist.runs.directory import RunDirectory
from cifar_dist.runs.metrics import METRICS
from cifar_dist.search.directory import SearchDirectory
from cifar_dist.search.space import searched_space
from cifar_dist.storage import write_atomically


def make(tmp_path: Path, **settings) -> tuple[RunDirectory, TrainConfig]:
    config = with_absolute_paths(TrainConfig(storage_path=str(tmp_path), **settings))
    run = RunDirectory.create(config)
    run.write_config(config)
    return run, config


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    make(tmp_path, name="a")
    with pytest.raises(UserError, match=r"--name a: .* exists; resume it with --resume"):
        make(tmp_path, name="a")


def test_runs_without_a_name_never_share_a_directory(tmp_path: Path) -> None:
    paths = {make(tmp_path)[0].path for _ in range(5)}
    assert len(paths) == 5
    assert all(path.name.startswith("cifar10-") for path in paths)


def test_a_file_in_the_way_of_the_storage_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--storage-path"):
        make(tmp_path / "file", name="a")


def test_config_reads_back(tmp_path: Path) -> None:
    run, config = make(tmp_path, name="a", lr=0.02, num_workers="1:2")
    # The name is the directory's: a config that is read back is for another run.
    assert run.read_config() == config.replace(name=None)


def test_a_run_from_before_its_preset_grew_keeps_its_settings(tmp_path: Path) -> None:
    run, config = make(tmp_path, name="a", preset="cifar", schedule="onecycle")
    old = yaml.safe_load(run.config_file.read_text())
    for name in ("ema", "warmup_epochs", "anneal", "final_lr_factor", "decay_norm_bias"):
        del old[name]
    run.config_file.write_text(yaml.safe_dump(old))
    assert run.read_config() == config.replace(name=None)


def resumed(config: TrainConfig, **changes) -> TrainConfig:
    return config.replace(resume=True, **changes)


def test_resume_refuses_what_would_compute_something_else(tmp_path: Path) -> None:
    _, config = make(tmp_path, name="a")
    with pytest.raises(UserError, match=r"--lr 0.5: the run was started with 0.001"):
        RunDirectory.existing(resumed(config, lr=0.5))


def test_resume_may_change_where_and_how_long(tmp_path: Path) -> None:
    run, config = make(tmp_path, name="a")
    changed = resumed(config, num_workers=3, max_epochs=60, max_failures=0)
    assert RunDirectory.existing(changed) == run


def test_resume_refuses_another_length_of_a_cycle(tmp_path: Path) -> None:
    _, config = make(tmp_path, name="a", schedule="onecycle", max_epochs=5)
    with pytest.raises(UserError, match="the run's schedule, onecycle, spans 5 epochs"):
        RunDirectory.existing(resumed(config, max_epochs=6))


def test_resume_refuses_fewer_epochs_than_were_done(tmp_path: Path) -> None:
    run, config = make(tmp_path, name="a", max_epochs=5)
    run.checkpoint(4).touch()
    with pytest.raises(UserError, match="has done 4 epochs already"):
        RunDirectory.existing(resumed(config, max_epochs=3))


def test_only_a_run_that_never_began_is_discarded(tmp_path: Path) -> None:
    (never, _), (begun, _) = make(tmp_path, name="never"), make(tmp_path, name="begun")
    begun.write_metrics([dict.fromkeys(METRICS, 1)])
    for run in (never, begun):
        run.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["begun"]


def test_checkpoints_newest_first_and_pruning(tmp_path: Path) -> None:
    run, _ = make(tmp_path, name="a")
    assert run.checkpoints_newest_first() == []
    # An epoch's end is behind its steps, and numbers are no text.
    in_order = [run.checkpoint(2), run.checkpoint(9, 200), run.checkpoint(9, 1000),
                run.checkpoint(9), run.checkpoint(10), run.checkpoint(12000, 3)]  # fmt: skip
    for file in in_order:
        file.touch()
    (run.checkpoints / ".epoch-20000.ckpt.abc.tmp").touch()  # half a checkpoint
    assert run.checkpoints_newest_first() == in_order[::-1]
    run.prune_checkpoints(keep={run.checkpoint(10), run.checkpoint(9, 200)})
    assert [file.name for file in run.checkpoints_newest_first()] == [
        "epoch-0010.ckpt",
        "epoch-0009-step-0200.ckpt",
    ]


def test_a_rejected_checkpoint_is_kept_and_not_tried_again(tmp_path: Path) -> None:
    run, _ = make(tmp_path, name="a")
    run.checkpoint(2).write_bytes(b"damaged")
    assert run.reject_checkpoint(run.checkpoint(2)).read_bytes() == b"damaged"
    assert run.checkpoints_newest_first() == []


def test_metrics_read_back_exactly(tmp_path: Path) -> None:
    run, _ = make(tmp_path, name="a")
    assert run.read_metrics() == []
    row = dict.fromkeys(METRICS, 0.1 + 0.2) | {"epoch": 1, "step": 2, "samples": 3, "world_size": 4}
    run.write_metrics([row])
    assert run.read_metrics() == [row]


def test_summary_of_an_unfinished_run_tells_what_is_known(tmp_path: Path) -> None:
    run, _ = make(tmp_path, name="a")
    rows = [
        dict.fromkeys(METRICS, 0) | {"epoch": epoch, "val_accuracy": accuracy}
        for epoch, accuracy in ((1, 0.5), (2, 0.75), (3, 0.75))
    ]
    run.write_metrics(rows)
    summary = run.write_summary("cifar10", "interrupted", None, restarts=1, seconds=2.5)
    assert (summary["epochs"], summary["best_epoch"], summary["val_accuracy"]) == (3, 2, 0.75)
    assert summary["test_accuracy"] is None
    assert summary["weights_sha256"] is None


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")
    with pytest.raises(TypeError):
        write_atomically(file, "not bytes")
    assert file.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_search_is_no_run(tmp_path: Path) -> None:
    config = TuneConfig(train=TrainConfig(storage_path=str(tmp_path), name="search"))
    SearchDirectory.create(config, searched_space(config))
    with pytest.raises(UserError, match="holds a search, not a run; resume it with tune"):
        RunDirectory.existing(TrainConfig(storage_path=str(tmp_path), name="search", resume=True))
    with pytest.raises(UserError, match="holds a search, not a run"):
        weights_file(EvaluateConfig(model=str(tmp_path / "search")))
