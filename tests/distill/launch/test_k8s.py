"""The manifest for Kubernetes: what its pods run, that they come back when they should, and that real schemas accept it.

The pods of the slow test are processes of this machine, with the command, the variables and the recipes of the manifest.
"""

import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from distill.errors import RecipeError, SetupError
from distill.launch import k8s
from distill.launch.detect import task_of
from tests.support import jobs
from tests.support.command import exit_code_of

RESOURCES = {"nvidia.com/gpu": "4", "memory": "900Gi"}
JOB = k8s.PodJob(
    name="family",
    words=("train", k8s.RECIPE_PATH, "a=[1, $(date)]", "b=off", "--out", "/data/runs"),
    recipes={"recipe.yaml": "name: family\nsteps: 10   \n\n# end\n"},
    image="registry.example/distill:1",
    claim="disk",
    mounted="/data",
    nodes=3,
    resources=RESOURCES,
    namespace="vision",
)


def documents(manifest: str) -> dict[str, Any]:
    """The objects of a manifest by kind."""
    return {each["kind"]: each for each in YAML(typ="safe").load_all(io.StringIO(manifest))}


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    return dict(job["spec"]["template"]["spec"]["containers"][0])


def variables_of(job: dict[str, Any], pod: int) -> dict[str, str]:
    """The variables of a pod as Kubernetes sets them."""
    each = {entry["name"]: entry.get("value", str(pod)) for entry in container_of(job)["env"]}
    assert "job-completion-index" in str(container_of(job)["env"])
    return each


def test_job__its_pods_are_tasks_that_find_the_first_one() -> None:
    found = documents(k8s.manifest_of(JOB, "job"))
    assert list(found) == ["ConfigMap", "Service", "Job"]
    assert {each["metadata"]["namespace"] for each in found.values()} == {"vision"}
    assert found["ConfigMap"]["data"] == JOB.recipes
    spec, pod = found["Job"]["spec"], found["Job"]["spec"]["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == 3 and spec["completionMode"] == "Indexed"
    task = task_of(variables_of(found["Job"], 2), "distill train")
    assert task is not None and (task.index, task.num_tasks, task.num_local) == (2, 3, 1)
    service, host = found["Service"], task.address.split(".")
    assert host == [f"{found['Job']['metadata']['name']}-0", service["metadata"]["name"]]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "family"}
    assert task.port == service["spec"]["ports"][0]["port"]
    assert container_of(found["Job"])["resources"] == {"limits": RESOURCES}
    command = container_of(found["Job"])["command"]
    assert command[:4] == ["distill", "train", "/etc/distill/recipe.yaml", "a=[1, $$(date)]"]


def test_job__stops_and_lost_nodes_do_not_count_and_what_is_hopeless_ends_it() -> None:
    job = documents(k8s.manifest_of(JOB, "job"))["Job"]
    command = container_of(job)["command"]
    stopped = int(command[command.index("--stopped-code") + 1])
    hopeless, again, disrupted = job["spec"]["podFailurePolicy"]["rules"]
    assert hopeless == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 5]}}
    assert again == {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [stopped]}}
    assert disrupted["action"] == "Ignore"
    assert disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # a policy needs it
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 300


def test_train_job__patches_the_pods_of_the_runtime() -> None:
    found = documents(k8s.manifest_of(JOB, "trainjob"))
    job = documents(k8s.manifest_of(JOB, "job"))["Job"]
    spec = found["TrainJob"]["spec"]
    assert spec["trainer"]["command"] == container_of(job)["command"]
    assert spec["trainer"]["numNodes"] == 3
    (patched,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"][
        "replicatedJobs"
    ]
    pod, same = patched["template"]["spec"]["template"]["spec"], job["spec"]["template"]["spec"]
    for name in ("volumes", "terminationGracePeriodSeconds"):
        assert pod[name] == same[name]
    assert pod["containers"][0]["volumeMounts"] == container_of(job)["volumeMounts"]
    memory = {"name": "memory", "emptyDir": {"medium": "Memory"}}
    assert memory in pod["volumes"]
    mounts = {each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"/data", "/etc/distill", "/dev/shm"}


@pytest.mark.parametrize("kind", k8s.KINDS)
def test_manifest__means_the_same_to_readers_of_yaml_1_1(kind: str) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    manifest = k8s.manifest_of(JOB, kind)
    assert {each["kind"]: each for each in yaml.safe_load_all(manifest)} == documents(manifest)


def test_job__passes_the_schemas_of_kubernetes() -> None:
    schemas = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate: the schemas, offline"
    )
    found = documents(k8s.manifest_of(JOB, "job"))
    for version in ("1.31", schemas.latest_version()):
        for each in found.values():
            schemas.validate(each, version, strict=True)
    found["Job"]["spec"]["completionz"] = 3
    with pytest.raises(schemas.ValidationError, match="completionz"):
        schemas.validate(found["Job"], "1.31", strict=True)


def test_train_job__passes_the_model_of_kubeflow_trainer() -> None:
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="pip install kubeflow_trainer_api: the models"
    )
    job = documents(k8s.manifest_of(JOB, "trainjob"))["TrainJob"]
    read = models.TrainerV1alpha1TrainJob.from_dict
    assert read(job).to_dict() == job  # the model leaves out what it does not know
    wrong = {**job, "spec": {**job["spec"], "runtimePatchez": []}}
    assert read(wrong).to_dict() != wrong
    trainer = {**job["spec"]["trainer"], "numNodes": "three"}
    with pytest.raises(ValueError, match="numNodes"):
        read({**job, "spec": {**job["spec"], "trainer": trainer}})


def test_recipes__of_the_family_and_of_its_teacher_come_along(tmp_path: Path) -> None:
    family = jobs.write_recipes(tmp_path, stage_steps=20, steps=2, save_every=1000)
    texts, needed = k8s.recipes_of(str(family), ["schedule.steps=3"])
    assert texts == {
        "recipe.yaml": family.read_text(),
        "teacher.yaml": (tmp_path / "teacher.yaml").read_text(),
    }
    assert needed == ["schedule.steps=3", "teacher.train=teacher.yaml"]
    texts, needed = k8s.recipes_of(str(tmp_path / "teacher.yaml"), [])
    assert list(texts) == ["recipe.yaml"] and needed == []


def test_names_and_resources__are_what_kubernetes_takes() -> None:
    assert k8s.name_of("Family_ViT") == "family-vit"
    for name in ("7b", "a" * 53, "__"):
        with pytest.raises(RecipeError, match="the name of a job of Kubernetes"):
            k8s.name_of(name)
    assert k8s.resources_of(["rdma/ib=8", "cpu=1500m"], 8) == {
        "nvidia.com/gpu": "8",
        "rdma/ib": "8",
        "cpu": "1500m",
    }
    for text in ("memory", "memory=much", "=3", "memory=900GB"):
        with pytest.raises(RecipeError, match=r"--resource .*: must be NAME=QUANTITY"):
            k8s.resources_of([text], None)
    with pytest.raises(RecipeError, match="--kind jobset: must be one of job, trainjob"):
        k8s.manifest_of(JOB, "jobset")


def test_apply__returns_what_kubectl_prints_or_why_there_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="kubectl: not found, nothing was submitted"):
        k8s.apply("")
    kubectl = tmp_path / "kubectl"
    kubectl.write_text('#!/bin/sh\nread first; echo "$@ $first"\n')
    kubectl.chmod(0o755)
    assert k8s.apply(k8s.manifest_of(JOB, "job")) == "apply -f - apiVersion: v1"
    kubectl.write_text("#!/bin/sh\necho 'spec: field is immutable' >&2; exit 1\n")
    with pytest.raises(SetupError, match="kubectl refuses it: spec: field is immutable"):
        k8s.apply("")


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


@pytest.fixture
def pods() -> Iterator["list[subprocess.Popen[str]]"]:
    started = list[subprocess.Popen[str]]()
    yield started
    for each in started:
        if jobs.session_of(each.pid):
            os.killpg(each.pid, signal.SIGKILL)
        each.communicate()


@pytest.mark.slow
def test_pods__one_is_evicted_all_save_and_come_back_and_go_on(
    tmp_path: Path, pods: "list[subprocess.Popen[str]]", capsys: pytest.CaptureFixture[str]
) -> None:
    family = jobs.write_recipes(tmp_path, stage_steps=1000, steps=1, save_every=1000)
    teacher = str(family.with_name("teacher.yaml"))
    words = (
        teacher,
        "engine.log_every=1",
        "--image",
        "i",
        "--claim",
        "c",
        "--mount",
        str(tmp_path),
        "--nodes",
        "2",
    )
    assert exit_code_of("launch", "k8s", *words, "--dry-run") == 0
    found = documents(capsys.readouterr().out)
    recipes = tmp_path / "etc"
    recipes.mkdir()
    for name, text in found["ConfigMap"]["data"].items():
        (recipes / name).write_text(text)
    (_, *command) = container_of(found["Job"])["command"]
    command = [word.replace("/etc/distill", str(recipes)) for word in command]
    run, port = tmp_path / "runs" / "tiny-teacher", free_port()

    def start(pod: int, *more: str) -> None:
        variables = variables_of(found["Job"], pod)
        variables |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
        pods.append(
            subprocess.Popen(
                [sys.executable, "-m", "distill", *command, *more],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**jobs.ENVIRONMENT, **variables},
                start_new_session=True,
            )
        )

    for pod in range(2):
        start(pod)
    jobs.wait_for_step(pods[0], run, "base", 3)
    pods[1].send_signal(signal.SIGTERM)
    for each in pods:
        told = each.communicate(timeout=120)[0]
        assert each.returncode == k8s.STOPPED, told
    saved = jobs.status_of(run)
    metrics = run / "metrics" / "teacher.jsonl"
    rows = metrics.read_text()
    assert saved["state"] == "stopped" and 3 <= saved["step"] < 1000
    for pod in range(2):
        start(pod)
    jobs.wait_for_step(pods[2], run, "base", saved["step"] + 1)
    assert rows and metrics.read_text().startswith(rows)  # they have times: none was written anew
