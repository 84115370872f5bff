"""The cluster file of ``ray up``: taken by Ray, closed to others."""

from __future__ import annotations

import shlex

import jsonschema
import pytest

from tests.launch.manifests import ray_cluster


def test_ray_up_takes_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(ray_cluster())
    validate_config(prepared)
    (kind_of_node,) = prepared["available_node_types"].values()
    assert kind_of_node["min_workers"] == len(ray_cluster()["provider"]["worker_ips"])


def test_a_key_that_ray_up_does_not_know_is_found() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="dockr"):
        validate_config(prepare_config({**ray_cluster(), "dockr": {}}))


def test_ray_ups_cluster_listens_on_localhost_and_asks_for_a_token() -> None:
    cluster = ray_cluster()
    (head,) = [each for each in cluster["head_start_ray_commands"] if "--head" in each]
    assert "--dashboard-host=127.0.0.1" in shlex.split(head)
    (mounted,) = cluster["file_mounts"]
    assert f"--env RAY_AUTH_TOKEN_PATH={mounted}" in cluster["docker"]["run_options"]
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    assert not any("RAY_AUTH_MODE" in each for each in commands), "the image asks for it"
