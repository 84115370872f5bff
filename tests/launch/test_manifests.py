"""What the cluster manifests hold: valid by their schemas, safe, and true to the command line."""

from __future__ import annotations

import copy
import fnmatch
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from cifar_dist.cli import parse_train, parse_tune
from tests.conftest import ROOT

LAUNCH = ROOT / "launch"
RAYJOBS = {name: LAUNCH / "kuberay" / f"rayjob-{name}.yaml" for name in ("train", "tune")}
MANIFESTS = sorted(
    file
    for folder in (LAUNCH, LAUNCH / "kuberay", LAUNCH / "slurm")
    for file in folder.glob("*")
    if file.suffix in (".yaml", ".sbatch", ".bash") or file.name == "Dockerfile"
)
GUIDE = ROOT / "docs" / "cluster.md"
SCHEMA = json.loads((Path(__file__).parent / "schemas" / "rayjob.json").read_text())
KUBERNETES = "1.33"  # pods here use nothing newer

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PARSERS: dict[str, Callable[[list[str]], Any]] = {"train": parse_train, "tune": parse_tune}


def pinned() -> dict[str, str]:
    """What constraints.txt pins, by canonical name; of versions by platform the last."""
    lines = re.findall(
        r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", (ROOT / "constraints.txt").read_text(), re.M
    )
    return {canonicalize_name(name): version for name, version in lines}


def read(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(RAYJOBS[name].read_text())
    return loaded


@pytest.fixture(params=RAYJOBS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def spec(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = read(kind)["spec"]
    return found


def pods(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The spec of each pod, by what it is."""
    cluster = spec["rayClusterSpec"]
    templates = {
        "submitter": spec["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        **{group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]},
    }
    return {name: template["spec"] for name, template in templates.items()}


def containers(spec: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each container with its pod's spec, and the autoscaler's, which KubeRay adds."""
    for pod in pods(spec).values():
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            yield pod, container
    yield pods(spec)["head"], spec["rayClusterSpec"]["autoscalerOptions"]


def as_pod(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}


def worker_group(spec: dict[str, Any]) -> dict[str, Any]:
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    found: dict[str, Any] = group
    return found


# --- KubeRay: schemas


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


# --- KubeRay: policy


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


def parse(kind: str, command: str) -> Any:
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", f"cifar_dist.{kind}"]
    return PARSERS[kind](words[3:])


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


COMMAND_IN_A_COMMENT = re.compile(
    r"(?:sbatch\b.*? launch/slurm/(train|tune)\.sbatch"
    r"|python -m (?:cifar_dist\.|launch\.submit .* -- )(train|tune)) (.*)"
)


def commands_in_comments() -> list[tuple[str, str, str]]:
    found = []
    for file in [*MANIFESTS, GUIDE]:
        text = re.sub(r" \\\n# *", " ", file.read_text())
        for line in text.splitlines():
            block = file == GUIDE or line.startswith("#  ")
            if block and (match := COMMAND_IN_A_COMMENT.search(line)):
                # Where there are GPUs, the batch files say so themselves.
                given = "--use-gpu " if match[1] else ""
                found.append((file.name, match[1] or match[2], given + match[3]))
    return found


@pytest.mark.parametrize(("file", "command", "words"), commands_in_comments())
def test_commands_in_comments_are_ones_that_the_command_line_takes(
    file: str, command: str, words: str
) -> None:
    PARSERS[command](shlex.split(words.replace(" --resume", "")))  # of a run that is not there


def test_comments_do_hold_commands() -> None:
    assert {file for file, _, _ in commands_in_comments()} >= {
        "train.sbatch",
        "tune.sbatch",
        "ray-cluster.yaml",
        "cluster.md",
    }


# --- Secrets


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_no_manifest_holds_a_secret(file: Path) -> None:
    text = file.read_text()
    assert not re.search(r"\b[0-9a-fA-F]{32,}\b", text), "a token or a digest"
    assert not re.search(r"kind: *Secret\b", text)
    assert not re.search(r"RAY_AUTH_TOKEN *[=:]", text), "by file or from KubeRay's Secret only"
    assert not re.search(r"(?i)\b(password|passwd|api[_-]?key|secret)\s*[:=]\s*\S", text)
    assert "BEGIN" not in text


# --- Versions


def base_image() -> tuple[str, str, str]:
    """Version of Ray, of Python, and platform of the image that the Dockerfile begins with."""
    match = re.search(
        r"^FROM rayproject/ray:([0-9.]+)-py3([0-9]+)-(gpu|cu[0-9]+)$",
        (LAUNCH / "Dockerfile").read_text(),
        re.M,
    )
    assert match
    return match[1], f"3.{match[2]}", match[3]


def test_the_ray_of_manifests_and_image_is_the_one_of_constraints(spec: dict[str, Any]) -> None:
    ray = pinned()["ray"]
    assert base_image()[0] == ray
    assert spec["rayClusterSpec"]["rayVersion"] == ray


def test_the_python_of_the_image_is_one_that_the_project_takes() -> None:
    assert base_image()[1] in SpecifierSet(PYPROJECT["project"]["requires-python"])


def test_all_name_the_image_of_this_version(spec: dict[str, Any]) -> None:
    image = f"registry.example.com/cifar-dist:{PYPROJECT['project']['version']}"
    assert {each["image"] for _, each in containers(spec) if "image" in each} == {image}
    assert ray_cluster()["docker"]["image"] == image
    assert f"-t {image} ." in (LAUNCH / "Dockerfile").read_text()


def test_uv_of_the_image_is_the_one_of_the_makefile() -> None:
    makefile = re.search(r"^UV := (\S+)$", (ROOT / "Makefile").read_text(), re.M)
    assert makefile
    assert f" uv=={makefile[1]} " in (LAUNCH / "Dockerfile").read_text()


# --- The image


def instructions() -> list[tuple[str, str]]:
    text = (LAUNCH / "Dockerfile").read_text()
    lines = re.sub(r"\s*\\\n\s*", " ", re.sub(r"^#.*\n", "", text, flags=re.M)).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path at the top out of what `docker build` sees."""
    last = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatch(path, line.removeprefix("!")):
            last = not line.startswith("!")
    return last


def test_all_that_the_image_copies_is_there_and_not_ignored() -> None:
    copied = [
        source.rstrip("/")
        for name, rest in instructions()
        if name in ("COPY", "ADD")
        for source in rest.split()[:-1]
    ]
    assert set(copied) >= set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    for source in copied:
        assert (ROOT / source).exists()
        assert not ignored(source)


@pytest.mark.parametrize("path", [".git", ".venv", "data", "runs", ".ray-1.x", "tests", "a.out"])
def test_the_image_is_built_without(path: str) -> None:
    assert ignored(path)


def test_the_image_runs_as_a_user_who_is_not_root_and_asks_for_a_token() -> None:
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users[-1] == "1000"
    assert ("ENV", "RAY_AUTH_MODE=token") in instructions()


def test_the_image_installs_nothing_that_is_not_pinned_by_hash() -> None:
    (run,) = [rest for name, rest in instructions() if name == "RUN"]
    install = shlex.split(run.partition("&& uv pip install")[2])
    assert {"--require-hashes", "--constraint", "--requirement"} <= set(install)
    names = {
        canonicalize_name(re.split(r"[\[<>=!;]", each)[0])
        for each in PYPROJECT["project"]["dependencies"]
    }
    assert names <= pinned().keys()


# --- ray up


def ray_cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((LAUNCH / "ray-cluster.yaml").read_text())
    return loaded


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
