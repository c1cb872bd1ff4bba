"""``distill launch``: the same run on a cluster."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import (
    DebugOption,
    NameOption,
    OutOption,
    OverridesArgument,
    RecipeArgument,
    say,
)

launch_app = typer.Typer(
    help="Start the same run on several machines.", no_args_is_help=True, rich_markup_mode="rich"
)
PASSED_ON = "Passed on to sbatch."
NodesOption = Annotated[int, typer.Option("--nodes", min=1, help="Machines of the job.")]
GpusPerNodeOption = Annotated[
    int | None, typer.Option("--gpus-per-node", min=1, help="GPUs, and so ranks, of each machine.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done, and contact no one.")
]


def _words(
    recipe: str, overrides: list[str], out: Path, name: str | None, gpus: int | None
) -> list[str]:
    """The words of ``distill train`` for every machine."""
    words = ["train", recipe, *overrides, "--out", str(out.absolute()), "--plain"]
    words += [] if name is None else ["--name", name]
    return words + ([] if gpus is None else ["--gpus", str(gpus)])


@launch_app.command("slurm")
def slurm(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    nodes: NodesOption = 1,
    gpus_per_node: GpusPerNodeOption = None,
    cpus_per_task: Annotated[
        int | None,
        typer.Option("--cpus-per-task", min=1, help="CPUs of each machine; without it all."),
    ] = None,
    partition: Annotated[str | None, typer.Option("--partition", help=PASSED_ON)] = None,
    account: Annotated[str | None, typer.Option("--account", help=PASSED_ON)] = None,
    time: Annotated[str | None, typer.Option("--time", help=PASSED_ON)] = None,
    qos: Annotated[str | None, typer.Option("--qos", help=PASSED_ON)] = None,
    constraint: Annotated[str | None, typer.Option("--constraint", help=PASSED_ON)] = None,
    container: Annotated[
        str | None,
        typer.Option("--container", metavar="IMAGE", help="Image for srun with pyxis and enroot."),
    ] = None,
    out: OutOption = Path("runs"),
    name: NameOption = None,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Submit the run as a batch job, which saves, is queued again and goes on by itself."""
    from distill.launch.slurm import GRACE_S, SlurmJob, script_of, submit
    from distill.recipe.reader import load_job

    texts = list(overrides or [])
    parsed, _ = load_job(recipe, texts)
    passed_on = {
        "partition": partition,
        "account": account,
        "time": time,
        "qos": qos,
        "constraint": constraint,
    }
    program = ["distill"] if container else [sys.executable, "-m", "distill"]
    run_folder = out.absolute() / (name or parsed.name)
    script = script_of(
        SlurmJob(
            name or parsed.name,
            (*program, *_words(recipe, texts, out, name, gpus_per_node)),
            run_folder,
            Path.cwd(),
            nodes,
            gpus_per_node,
            cpus_per_task,
            container,
            {key: value for key, value in passed_on.items() if value is not None},
            parsed.checkpoint.grace or GRACE_S,
        )
    )
    if dry_run:
        sys.stdout.write(script)
        return
    out.mkdir(parents=True, exist_ok=True)
    say(f"job {submit(script)}")
    say(f"distill watch {shlex.quote(str(run_folder))}")


@launch_app.command("k8s")
def k8s(
    recipe: RecipeArgument,
    image: Annotated[str, typer.Option("--image", help="Container image that has distill.")],
    claim: Annotated[
        str, typer.Option("--claim", help="Volume claim of a disk that all pods can write.")
    ],
    overrides: OverridesArgument = None,
    nodes: NodesOption = 1,
    gpus_per_node: GpusPerNodeOption = None,
    resource: Annotated[
        list[str] | None,
        typer.Option("--resource", metavar="NAME=QUANTITY", help="Of each pod; may be repeated."),
    ] = None,
    mount: Annotated[
        Path, typer.Option("--mount", help="Where the disk is in the pods; runs are in its runs/.")
    ] = Path("/shared"),
    kind: Annotated[
        str, typer.Option("--kind", metavar="job|trainjob", help="trainjob: of Kubeflow Trainer.")
    ] = "job",
    namespace: Annotated[str | None, typer.Option("--namespace")] = None,
    name: NameOption = None,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Apply a manifest that runs the job in pods, which save, come back and go on by themselves."""
    from distill.launch.k8s import (
        RECIPE_PATH,
        PodJob,
        apply,
        manifest_of,
        name_of,
        recipes_of,
        resources_of,
    )
    from distill.launch.slurm import GRACE_S
    from distill.recipe.reader import load_job

    parsed, _ = load_job(recipe, list(overrides or []))
    run, grace_s = name or parsed.name, parsed.checkpoint.grace or GRACE_S
    texts, needed = recipes_of(recipe, list(overrides or []))
    words = _words(RECIPE_PATH, needed, mount / "runs", name, gpus_per_node)
    resources = resources_of(resource or [], gpus_per_node)
    job = PodJob(
        name_of(run),
        tuple(words),
        texts,
        image,
        claim,
        str(mount),
        nodes,
        resources,
        namespace,
        grace_s,
    )
    manifest = manifest_of(job, kind)
    if dry_run:
        sys.stdout.write(manifest)
        return
    say(apply(manifest))
    say(f"where the disk of {claim} is mounted: distill watch {shlex.quote(f'runs/{run}')}")


@launch_app.command("ssh")
def ssh(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    hosts: Annotated[
        str, typer.Option("--hosts", metavar="A,B", help="Host names; rank 0 is on the first.")
    ] = "",
    gpus_per_node: GpusPerNodeOption = None,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, help="A free one of the first host.")
    ] = 29500,
    out: OutOption = Path("runs"),
    name: NameOption = None,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Print the line to type for each machine; nothing is run."""
    from distill.launch.ssh import lines_of
    from distill.recipe.reader import load_job

    texts = list(overrides or [])
    load_job(recipe, texts)
    words = _words(recipe, texts, out, name, gpus_per_node)
    for line in lines_of(hosts, port, Path.cwd(), [sys.executable, "-m", "distill", *words]):
        sys.stdout.write(line + "\n")
