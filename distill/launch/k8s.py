"""The manifest that runs a job under Kubernetes: pods that run the command line that people type.

    job        an Indexed Job with a headless Service; needs nothing but Kubernetes 1.31
    trainjob   a TrainJob of Kubeflow Trainer, for clusters that have it: queues, quotas and its runtimes

A pod is a task of a node, found by the variables ``PET_*`` (``distill.launch.detect``), and starts the ranks of its
GPUs. A JobSet is not written: it is what Kubeflow Trainer makes of a TrainJob.

When one pod ends early, so do the ranks of all others, and each pod is made anew. A pod that was stopped ends with
``STOPPED``, since a pod that ends with 0 counts as done and does not come back.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

from distill.errors import RecipeError
from distill.launch.slurm import GRACE_S, STARTS
from distill.launch.submit import hand_over
from distill.listing.document import find_recipe
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job, teacher_recipe_of
from distill.runfolder.parked import PARKED_EXIT_CODE

STOPPED = 75  # "try again later" of sysexits.h
HOPELESS = sorted([RecipeError.exit_code, PARKED_EXIT_CODE])  # of no use to start again
PORT = 29400
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
LONGEST_NAME = 52  # a pod's has a hyphen and its number behind it, and 63 letters at most
KINDS = ("job", "trainjob")
RECIPES, RECIPE, TEACHER = "/etc/distill", "recipe.yaml", "teacher.yaml"  # in the pods
RECIPE_PATH = f"{RECIPES}/{RECIPE}"
QUANTITY = re.compile(r"([\w./-]+)=(\d+(?:\.\d+)?(?:[mkMGTPE]|[KMGTPE]i)?)")


@dataclass(frozen=True)
class PodJob:
    """What the manifest is made of; ``recipes`` are texts by file name, ``words`` those behind ``distill``."""

    name: str
    words: tuple[str, ...]
    recipes: Mapping[str, str]
    image: str
    claim: str  # of the volume that all pods share
    mounted: str  # where it is in the pods
    nodes: int
    resources: Mapping[str, str] = field(default_factory=dict)  # of each pod
    namespace: str | None = None
    grace_s: int = GRACE_S


def recipes_of(recipe: str, overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the texts of a recipe and of the teacher's recipe that it names, and the overrides that a pod needs.

    Raises:
        RecipeError: every problem of both files.
    """
    loaded, teacher = load_job(recipe, overrides)
    path = find_recipe(recipe)
    texts, needed = {RECIPE: path.read_text(encoding="utf-8")}, list(overrides)
    if teacher is not None:
        assert isinstance(loaded, FamilyRecipe), "it names the teacher's recipe"
        named = teacher_recipe_of(path, str(loaded.teacher.train))
        texts[TEACHER] = named.read_text(encoding="utf-8")
        needed += [f"teacher.train={TEACHER}"]
    return texts, needed


def resources_of(texts: Sequence[str], gpus: int | None) -> dict[str, str]:
    """Returns the resources of a pod by name, from ``NAME=QUANTITY`` and its GPUs.

    Raises:
        RecipeError: a text is not of that form.
    """
    found = {} if gpus is None else {"nvidia.com/gpu": str(gpus)}
    for text in texts:
        match = QUANTITY.fullmatch(text)
        if match is None:
            raise RecipeError(
                f"--resource {text!r}: must be NAME=QUANTITY",
                fix="Write --resource cpu=64 --resource memory=900Gi.",
            )
        found[match[1]] = match[2]
    return found


def name_of(run: str) -> str:
    """Returns the name of the job for the name of a run, with hyphens for what names in Kubernetes cannot hold.

    Raises:
        RecipeError: it is too long, or begins with a digit.
    """
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not re.match("[a-z]", name) or len(name) > LONGEST_NAME:
        raise RecipeError(
            f"{name!r}: the name of a job of Kubernetes begins with a letter and has at most {LONGEST_NAME}",
            fix="Give another one with --name, such as --name my-family.",
        )
    return name


def manifest_of(job: PodJob, kind: str) -> str:
    """Returns the YAML for ``kubectl apply``, a document for each object.

    Raises:
        RecipeError: the kind is not one of ``KINDS``.
    """
    if kind not in KINDS:
        raise RecipeError(
            f"--kind {kind}: must be one of {', '.join(KINDS)}",
            fix="Leave --kind out where the cluster has no Kubeflow Trainer.",
        )
    config = _object("v1", "ConfigMap", job)
    config["data"] = {name: LiteralScalarString(text) for name, text in job.recipes.items()}
    objects = (
        [config, _train_job(job)] if kind == "trainjob" else [config, _service(job), _job(job)]
    )
    yaml, stream = YAML(), io.StringIO()
    yaml.width = 4096  # a command's word on one line
    yaml.dump_all(objects, stream)
    return stream.getvalue()


def apply(manifest: str) -> str:
    """Hands the manifest to ``kubectl``; returns the lines that it prints.

    Raises:
        SetupError: there is no kubectl here, or it refuses the manifest.
    """
    return hand_over(
        manifest,
        ["kubectl", "apply", "-f", "-"],
        look_at="kubectl get pods",
        correct="Correct the options; delete a job of this name that is there: kubectl delete job NAME.",
    )


def _object(version: str, kind: str, job: PodJob) -> dict[str, Any]:
    namespace = {} if job.namespace is None else {"namespace": job.namespace}
    return {"apiVersion": version, "kind": kind, "metadata": {"name": job.name, **namespace}}


def _job(job: PodJob) -> dict[str, Any]:
    container = {
        "name": "node",
        "image": job.image,
        "command": _command(job),
        "env": [
            {"name": "PET_NNODES", "value": str(job.nodes)},
            {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}},
            {"name": "PET_MASTER_ADDR", "value": f"{job.name}-0.{job.name}"},
            {"name": "PET_MASTER_PORT", "value": str(PORT)},
        ],
        "resources": {"limits": dict(job.resources)},
        "volumeMounts": _mounts(job),
    }
    pod = {
        "subdomain": job.name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_s,
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": _volumes(job),
    }
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    rules = [
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": HOPELESS}},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [STOPPED]}},
        {"action": "Ignore", "onPodConditions": [disrupted]},
    ]
    spec = {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": STARTS
        * job.nodes,  # failures of all pods that count; lost nodes and stops do not
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod},
    }
    return _object("batch/v1", "Job", job) | {"spec": spec}


def _service(job: PodJob) -> dict[str, Any]:
    """Gives the pods their names before they are ready."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": job.name},
        "ports": [{"name": "store", "port": PORT}],
    }
    return _object("v1", "Service", job) | {"spec": spec}


def _train_job(job: PodJob) -> dict[str, Any]:
    pod = {
        "terminationGracePeriodSeconds": job.grace_s,
        "containers": [{"name": "node", "volumeMounts": _mounts(job)}],
        "volumes": _volumes(job),
    }
    node = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    runtime = {"template": {"spec": {"replicatedJobs": [node]}}}
    spec = {
        "runtimeRef": {"name": "torch-distributed"},
        "trainer": {
            "image": job.image,
            "command": _command(job),
            "numNodes": job.nodes,
            "resourcesPerNode": {"limits": dict(job.resources)},
        },
        "runtimePatches": [{"manager": "distill/launch", "trainingRuntimeSpec": runtime}],
    }
    return _object("trainer.kubeflow.org/v1alpha1", "TrainJob", job) | {"spec": spec}


def _command(job: PodJob) -> list[str]:
    """The words; quoted, since kubectl reads YAML 1.1, and without variables, since a command may name some there."""
    words = ["distill", *job.words, "--stopped-code", str(STOPPED)]
    return [DoubleQuotedScalarString(word.replace("$(", "$$(")) for word in words]


def _volumes(job: PodJob) -> list[dict[str, Any]]:
    """The shared disk, the recipes, and shared memory: that of a container has 64 MB by itself."""
    return [
        {"name": "shared", "persistentVolumeClaim": {"claimName": job.claim}},
        {"name": "recipes", "configMap": {"name": job.name}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
    ]


def _mounts(job: PodJob) -> list[dict[str, Any]]:
    return [
        {"name": "shared", "mountPath": job.mounted},
        {"name": "recipes", "mountPath": RECIPES, "readOnly": True},
        {"name": "memory", "mountPath": "/dev/shm"},
    ]
