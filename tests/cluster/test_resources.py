"""What is refused before Ray is asked for it, and what is waited for."""

import json
import os
import subprocess
import sys

import pytest

from cifar_dist.cluster.resources import refuse_unplaceable
from cifar_dist.errors import UserError
from tests.conftest import PYTHON_PATH
from tests.processes import PATIENCE_S

CPU_NODE = {"CPU": 8.0, "memory": 1e9}
GPU_NODE = {"CPU": 4.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("workers", "each", "nodes"),
    [
        (8, {"CPU": 1.0}, [CPU_NODE]),
        (12, {"CPU": 1.0}, [CPU_NODE, GPU_NODE]),
        (2, {"CPU": 1.0, "GPU": 1.0}, [CPU_NODE, GPU_NODE]),
        (4, {"CPU": 1.0, "GPU": 0.5}, [GPU_NODE]),
        (2, {"CPU": 1.0, "GPU": 0.6}, [GPU_NODE]),
        (4, {"CPU": 1.0, "GPU": 0.4}, [GPU_NODE]),
        (20, {"CPU": 0.1, "GPU": 0.1}, [GPU_NODE]),
        (6, {"CPU": 0.5, "GPU": 1 / 3}, [GPU_NODE]),
        (1, {"CPU": 1.0, "GPU": 2.0}, [GPU_NODE]),
        (20, {"CPU": 0.4}, [CPU_NODE]),
        (3, {"CPU": 0.1}, [{"CPU": 0.3}]),  # 0.1 three times is a little more than 0.3
    ],
)
def test_what_fits_passes(workers: int, each: dict, nodes: list[dict]) -> None:
    refuse_unplaceable(workers, each, nodes)


@pytest.mark.parametrize(
    ("workers", "each", "nodes", "said"),
    [
        (
            9,
            {"CPU": 1.0},
            [CPU_NODE],
            r"needs 9 x \(1 CPU\), and the cluster has 8 CPU, room for 8",
        ),
        # 12 CPUs in all, but none of the nodes has 5 twice.
        (3, {"CPU": 5.0}, [CPU_NODE, GPU_NODE], "room for 1; use --num-workers 1"),
        (1, {"CPU": 1.0, "GPU": 1.0}, [CPU_NODE], r"has 8 CPU, 0 GPU, .*omit --use-gpu"),
        (3, {"CPU": 1.0, "GPU": 1.0}, [GPU_NODE], "has 4 CPU, 2 GPU, room for 2"),
        # 2 GPUs in all, but what is left over on both is no third of 0.6.
        (3, {"CPU": 1.0, "GPU": 0.6}, [GPU_NODE], "room for 2; use --num-workers 2"),
        (5, {"CPU": 0.5, "GPU": 0.4}, [GPU_NODE], "room for 4; use --num-workers 4"),
        (2, {"CPU": 1.0, "GPU": 2.0}, [GPU_NODE], "room for 1"),
        (1, {"CPU": 9.0}, [CPU_NODE], "ask for less with --cpus-per-worker"),
    ],
)
def test_what_never_fits_is_refused_with_what_there_is(workers, each, nodes, said) -> None:
    with pytest.raises(UserError, match=said):
        refuse_unplaceable(workers, each, nodes)


AS_RAY_PLACES = """
import json
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from cifar_dist.cluster.resources import room

ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
counts = {}
for each in (0.6, 0.4, 1 / 3, 0.35, 0.1, 1, 2):
    bundle = {"GPU": each}
    expected = room(bundle)
    groups = [placement_group([bundle]) for _ in range(expected)]
    placed = sum(group.wait(30) for group in groups)
    groups.append(placement_group([bundle]))
    counts[each] = [expected, placed, groups[-1].wait(0.5)]
    for group in groups:
        remove_placement_group(group)
print(json.dumps(counts))
"""


def test_parts_of_gpus_are_counted_as_ray_places_them() -> None:
    # In a process of its own: the cluster says that it has GPUs, and nobody looks for them.
    done = subprocess.run(
        [sys.executable, "-c", AS_RAY_PLACES],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert {each: found[0] for each, found in counts.items()} == {
        "0.6": 2, "0.4": 4, str(1 / 3): 6, "0.35": 4, "0.1": 20, "1": 2, "2": 1,
    }  # fmt: skip
    for each, (expected, placed, one_more) in counts.items():
        assert (placed, one_more) == (expected, False), each
