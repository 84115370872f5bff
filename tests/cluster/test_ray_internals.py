"""Ray's private names: where they are, when they are used, and that results do not depend on it."""

from __future__ import annotations

import ast
import functools
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import ray

import cifar_dist.cluster.trainer
from cifar_dist.cluster import ray_internals
from cifar_dist.config.train import TrainConfig
from cifar_dist.events import Event, Warned, WorkersLost
from cifar_dist.train import Trained, train
from tests.cluster import workers
from tests.conftest import ROOT
from tests.processes import PATIENCE_S
from tests.training.test_fit import without_timing


@pytest.fixture(autouse=True)
def _as_in_a_new_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ray_internals.PLAIN_RAY, raising=False)
    monkeypatch.setattr(ray_internals, "_driver_enabled", None)
    ray_internals._warn_untested.cache_clear()


@pytest.mark.parametrize(
    ("version", "tested"),
    [("2.60.0", True), ("2.60.7", True), ("2.6.0", False), ("2.61.0", False), ("3.0.0", False)],
)
def test_other_versions_use_the_public_api_and_one_line_says_so(
    version: str, tested: bool, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "__version__", version)
    caplog.set_level(logging.WARNING)
    assert [ray_internals.enabled() for _ in range(3)] == [tested] * 3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (not tested)
    if not tested:
        assert said[0].startswith(f"Ray {version}: not tested (tested: 2.60.x)")
        assert "\n" not in said[0]


@pytest.mark.parametrize(
    ("value", "plain"), [("1", True), ("yes", True), ("0", False), ("", False)]
)
def test_the_variable_forces_the_public_api(
    value: str, plain: bool, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ray_internals.PLAIN_RAY, value)
    assert ray_internals.enabled() is not plain
    monkeypatch.setattr(ray, "__version__", "2.61.0")
    assert not ray_internals.enabled()
    assert len(caplog.records) == (not plain)


@pytest.mark.parametrize("enabled", [True, False])
def test_other_processes_do_as_the_driver_does(enabled: bool, monkeypatch) -> None:
    monkeypatch.setenv(ray_internals.PLAIN_RAY, "1" if enabled else "0")
    assert ray_internals.enabled() is not enabled
    ray_internals.follow_driver(enabled)
    assert ray_internals.enabled() is enabled


WITH_ANOTHER_VERSION = """
from cifar_dist.cluster import ray_internals
from cifar_dist.cluster.session import session
from tests.processes import descendants

ray_internals.TESTED = ("1.0.",)
with session() as where:
    titles = descendants().values()
    print(sorted(name for name in ("/monitor.py", "/log_monitor.py")
                 if any(name in title for title in titles)))
    print(where, ray_internals.autoscales(), ray_internals.draining_nodes())
"""


def test_with_another_version_a_session_is_whole_and_says_one_line() -> None:
    words = [sys.executable, "-c", WITH_ANOTHER_VERSION]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "['/log_monitor.py', '/monitor.py']", "Ray, 1 node False set()",
    ]  # fmt: skip
    assert len(done.stderr.splitlines()) == 1
    assert "not tested (tested: 1.0.x)" in done.stderr


UNPICKLE = """
import pickle, sys
import cifar_dist.cluster.ray_internals, cifar_dist.cluster.session
print("ray.train" in sys.modules)
objects = pickle.load(sys.stdin.buffer)
print([type(each).__name__ for each in objects])
print(sorted({"torch", "torchvision", "lightning"} & set(sys.modules)))
"""


def test_the_controller_loads_no_torch_and_a_connection_no_ray_train() -> None:
    from ray import cloudpickle
    from ray.train import ScalingConfig

    given = [
        ray_internals.watch("a coordinator", 0),
        ray_internals._fixed_number(ScalingConfig(num_workers=2)),
        ray_internals._process_group("gloo"),
        ray_internals._process_group("gloo").backend_cls(),
    ]
    done = subprocess.run(
        [sys.executable, "-c", UNPICKLE],
        cwd=ROOT,
        input=cloudpickle.dumps(given),
        capture_output=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines() == [
        "False", "['Watch', 'FixedNumber', 'ProcessGroup', 'ProcessGroupBackend']", "[]",
    ]  # fmt: skip


def small_run(folder: Path, name: str, events: list, **settings) -> Trained:
    config = TrainConfig(
        max_epochs=2, batch_size=26, num_workers=2, report=False, storage_path=str(folder),
        name=name, **settings,
    )  # fmt: skip
    return train(config, events.append)


@pytest.mark.slow
def test_the_public_api_alone_gives_the_same_bits_also_after_a_kill(
    ray_cluster: None, few_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run under ``CIFAR_DIST_PLAIN_RAY=1``: three of two workers, on 144 images."""
    from ray.train.torch import TorchTrainer

    monkeypatch.setenv("CIFAR_DIST_DATA", str(few_digits))
    make, made = ray_internals.torch_trainer, []

    def noted(*given, **settings):
        made.append(make(*given, **settings))
        return made[-1]

    monkeypatch.setattr(ray_internals, "torch_trainer", noted)
    events: list[Event] = []
    usual = small_run(tmp_path, "usual", events)
    assert type(made.pop()) is not TorchTrainer
    assert not any(isinstance(event, WorkersLost | Warned) for event in events)

    monkeypatch.setenv(ray_internals.PLAIN_RAY, "1")
    plain = small_run(tmp_path, "plain", events)
    assert plain.summary["restarts"] == 0
    assert not any(isinstance(event, WorkersLost | Warned) for event in events)

    train_on_ray = cifar_dist.cluster.trainer.train_on_ray
    monkeypatch.setattr(
        "cifar_dist.cluster.trainer.train_on_ray",
        functools.partial(train_on_ray, worker=workers.killed_worker),
    )
    killed = small_run(tmp_path, "killed", events, max_failures=1, checkpoint_every="4s")
    assert killed.summary["restarts"] == 1
    lost = [event.message for event in events if isinstance(event, WorkersLost)]
    assert len(lost) == 1
    assert lost[0].startswith("worker ")
    assert lost[0].endswith(" failed")
    assert [type(each) for each in made] == [TorchTrainer, TorchTrainer]
    for other in (plain, killed):
        assert other.outcome.weights_sha256 == usual.outcome.weights_sha256
        assert without_timing(other.run) == without_timing(usual.run)


PRIVATE_PACKAGES = ("ray.autoscaler", "ray.experimental", "ray.train.v2")


def test_no_other_file_uses_a_private_name_of_rays() -> None:
    files = [
        file for package in ("cifar_dist", "launch") for file in (ROOT / package).rglob("*.py")
    ]
    found = {str(file.relative_to(ROOT)): private_names(file.read_text()) for file in files}
    assert found.pop(str(Path("cifar_dist", "cluster", "ray_internals.py")))
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import ray._private.state",
        "from ray import _raylet",
        "from ray._raylet import GcsClient",
        "from ray.train._internal import utils",
        "from ray.train.v2.api.config import RunConfig",
        "import ray.experimental.internal_kv as kv",
        "import ray\nray._private.worker",
        "from ray.train.torch import config\nconfig._shutdown_torch()",
    ],
)
def test_a_private_name_is_found(code: str) -> None:
    assert private_names(code)


def private_names(code: str) -> list[str]:
    """Return the private names of Ray's that code imports, or reads from what it imports."""
    names: dict[str, str] = {}  # by what they are bound to here
    used: list[str] = []
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                used.append(each.name)
                names[each.asname or each.name.split(".")[0]] = (
                    each.name if each.asname else each.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for each in node.names:
                used.append(f"{node.module}.{each.name}")
                names[each.asname or each.name] = used[-1]
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts, node = [node.attr, *parts], node.value
        if parts and isinstance(node, ast.Name) and node.id in names:
            used.append(".".join([names[node.id], *parts]))
    return [name for name in used if is_private(name)]


def is_private(name: str) -> bool:
    if name.split(".")[0] != "ray":
        return False
    parts = [part for part in name.split(".") if not part.startswith("__")]
    return any(part.startswith("_") for part in parts) or any(
        name == package or name.startswith(f"{package}.") for package in PRIVATE_PACKAGES
    )
