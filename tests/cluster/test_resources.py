"""What is refused before Ray is asked for it, and what is waited for."""

import pytest

from cifar_dist.cluster.resources import refuse_unplaceable
from cifar_dist.errors import UserError

CPU_NODE = {"CPU": 8.0, "memory": 1e9}
GPU_NODE = {"CPU": 4.0, "GPU": 2.0}


@pytest.mark.parametrize(
    ("workers", "each", "nodes"),
    [
        (8, {"CPU": 1.0}, [CPU_NODE]),
        (12, {"CPU": 1.0}, [CPU_NODE, GPU_NODE]),
        (2, {"CPU": 1.0, "GPU": 1.0}, [CPU_NODE, GPU_NODE]),
        (4, {"CPU": 1.0, "GPU": 0.5}, [GPU_NODE]),
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
        (1, {"CPU": 1.0, "GPU": 1.0}, [CPU_NODE], r"has 8 CPU, 0 GPU, .*leave out --use-gpu"),
        (3, {"CPU": 1.0, "GPU": 1.0}, [GPU_NODE], "has 4 CPU, 2 GPU, room for 2"),
        (1, {"CPU": 9.0}, [CPU_NODE], "ask for less with --cpus-per-worker"),
    ],
)
def test_what_never_fits_is_refused_with_what_there_is(workers, each, nodes, said) -> None:
    with pytest.raises(UserError, match=said):
        refuse_unplaceable(workers, each, nodes)
