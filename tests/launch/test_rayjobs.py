"""The RayJobs for KubeRay: valid by their schemas, safe, and true to the command line."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.launch.manifests import LAUNCH, RAYJOBS, containers, parse, pods, read, worker_group

SCHEMA = json.loads((Path(__file__).parent / "schemas" / "rayjob.json").read_text())
KUBERNETES = "1.33"  # pods here use nothing newer


def as_pod(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}


# --- Schemas


def test_rayjobs_hold_only_fields_that_kuberay_knows(kind: str) -> None:
    jsonschema.validate(read(kind), SCHEMA)


@pytest.mark.parametrize(
    "path",
    [
        ("spec",),
        ("spec", "rayClusterSpec"),
        ("spec", "rayClusterSpec", "authOptions"),
        ("spec", "rayClusterSpec", "autoscalerOptions"),
        ("spec", "rayClusterSpec", "headGroupSpec"),
        ("spec", "rayClusterSpec", "workerGroupSpecs", 0),
    ],
    ids=str,
)
def test_a_field_that_kuberay_does_not_know_is_found(
    kind: str, path: tuple[str | int, ...]
) -> None:
    job = copy.deepcopy(read(kind))
    place: Any = job
    for step in path:
        place = place[step]
    place["dedlineSeconds"] = 1
    with pytest.raises(jsonschema.ValidationError, match="dedlineSeconds"):
        jsonschema.validate(job, SCHEMA)


def test_pods_and_volume_are_valid_for_kubernetes(spec: dict[str, Any]) -> None:
    for pod in pods(spec).values():
        kubernetes_validate.validate(as_pod(pod), KUBERNETES, strict=True)
    autoscaler = {
        key: spec["rayClusterSpec"]["autoscalerOptions"][key]
        for key in ("resources", "securityContext")
    }
    container = {"name": "autoscaler", **autoscaler}
    kubernetes_validate.validate(as_pod({"containers": [container]}), KUBERNETES, strict=True)
    volume = yaml.safe_load((LAUNCH / "kuberay" / "volume.yaml").read_text())
    kubernetes_validate.validate(volume, KUBERNETES, strict=True)


def test_a_field_that_kubernetes_does_not_know_is_found(spec: dict[str, Any]) -> None:
    for pod in pods(spec).values():
        wrong = copy.deepcopy(pod)
        wrong["containers"][0]["securityContext"]["runAsNotRoot"] = True
        with pytest.raises(kubernetes_validate.ValidationError, match="runAsNotRoot"):
            kubernetes_validate.validate(as_pod(wrong), KUBERNETES, strict=True)


# --- Policy


def test_no_container_runs_as_root_or_may_become_it(spec: dict[str, Any]) -> None:
    for pod, container in containers(spec):
        context = {**pod["securityContext"], **container["securityContext"]}
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] == 1000
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not context.get("privileged")


def test_only_the_head_whose_autoscaler_asks_for_pods_may_talk_to_kubernetes(
    spec: dict[str, Any],
) -> None:
    for name, pod in pods(spec).items():
        assert pod.get("automountServiceAccountToken", True) is (name == "head")


def test_nothing_is_reachable_from_outside_the_cluster(kind: str, spec: dict[str, Any]) -> None:
    head = spec["rayClusterSpec"]["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["enableIngress"] is False
    text = RAYJOBS[kind].read_text()
    for word in ("NodePort", "LoadBalancer", "hostPort", "hostNetwork", "hostPath", "externalIPs"):
        assert word not in text


def test_ray_asks_for_a_token(spec: dict[str, Any]) -> None:
    assert spec["rayClusterSpec"]["authOptions"]["mode"] == "token"


def test_every_container_gets_what_it_asks_for_and_no_more(spec: dict[str, Any]) -> None:
    for _, container in containers(spec):
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= resources["limits"].keys()


def test_workers_have_gpus_and_the_head_has_none_for_workers(spec: dict[str, Any]) -> None:
    (worker,) = worker_group(spec)["template"]["spec"]["containers"]
    assert int(worker["resources"]["limits"]["nvidia.com/gpu"]) >= 1
    head = spec["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_a_job_that_cannot_start_or_never_ends_is_ended(spec: dict[str, Any]) -> None:
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]


def test_a_job_is_tried_once_since_its_name_is_then_taken(spec: dict[str, Any]) -> None:
    assert spec["backoffLimit"] == 0
    assert "--resume" not in spec["entrypoint"]


def test_the_cluster_is_deleted_afterwards_in_one_way(spec: dict[str, Any]) -> None:
    assert spec.get("shutdownAfterJobFinishes", False) is not ("deletionStrategy" in spec)
    assert spec["ttlSecondsAfterFinished"] > 0


def test_the_cluster_grows_and_shrinks(spec: dict[str, Any]) -> None:
    cluster, group = spec["rayClusterSpec"], worker_group(spec)
    assert cluster["enableInTreeAutoscaling"] is True
    assert 0 == group["minReplicas"] < group["replicas"] <= group["maxReplicas"]
    for name in ("head", "gpu"):  # the autoscaler replaces pods itself
        assert pods(spec)[name]["restartPolicy"] == "Never"


def test_all_pods_share_the_volume_that_data_and_runs_are_on(
    kind: str, spec: dict[str, Any]
) -> None:
    volume = yaml.safe_load((LAUNCH / "kuberay" / "volume.yaml").read_text())
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    claim = {"claimName": volume["metadata"]["name"]}
    for pod in pods(spec).values():
        (shared,) = [each for each in pod["volumes"] if "persistentVolumeClaim" in each]
        assert shared["persistentVolumeClaim"] == claim
        for container in pod["containers"]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts[shared["name"]] == "/shared"
    config = parse(kind, spec["entrypoint"])
    train = config if kind == "train" else config.train
    assert train.storage_path.startswith("/shared/")
    assert train.data_dir.startswith("/shared/")


def test_shared_memory_is_more_than_the_64_mib_that_a_container_has_by_itself(
    spec: dict[str, Any],
) -> None:
    for name in ("head", "gpu"):
        pod = pods(spec)[name]
        (shm,) = [each["emptyDir"] for each in pod["volumes"] if each["name"] == "shm"]
        (container,) = pod["containers"]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert shm["medium"] == "Memory"
        gibibytes = [
            int(size.removesuffix("Gi"))
            for size in (shm["sizeLimit"], container["resources"]["limits"]["memory"])
        ]
        assert 2 <= gibibytes[0] <= gibibytes[1] / 2


def test_a_pod_that_is_preempted_has_time_to_tell_ray_and_to_save(spec: dict[str, Any]) -> None:
    from ray.scripts.scripts import drain_node

    pod = worker_group(spec)["template"]["spec"]
    shell, flag, script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, flag) == ("bash", "-c")
    words = shlex.split(script)
    told = words[words.index("drain-node") + 1 : words.index("&&")]
    parsed = drain_node.make_context("drain-node", told).params  # raises for an unknown flag
    assert parsed["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    longest = int(words[words.index("timeout") + 1]) + int(words[words.index("sleep") + 1])
    assert longest < pod["terminationGracePeriodSeconds"]


# --- Commands


def test_entrypoints_are_commands_that_the_command_line_takes(
    kind: str, spec: dict[str, Any]
) -> None:
    config = parse(kind, spec["entrypoint"])
    assert (config if kind == "train" else config.train).max_failures > 0


def test_the_pods_that_start_first_hold_what_the_command_asks_for(
    kind: str, spec: dict[str, Any]
) -> None:
    """The commands look at the cluster as it is when they start."""
    config = parse(kind, spec["entrypoint"])
    base, workers = (config, config.min_workers) if kind == "train" else (config.trial_base, 1)
    assert base.use_gpu
    group = worker_group(spec)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    a_pod = min(
        int(limits["nvidia.com/gpu"]) / base.gpus_per_worker,
        int(limits["cpu"]) / base.cpus_per_worker,
    )
    assert workers <= int(a_pod) * group["replicas"]
