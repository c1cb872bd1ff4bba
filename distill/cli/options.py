"""What several verbs share: arguments and options, data from ``--data``, and how things are printed."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.errors import RecipeError
from distill.recipe.override_words import check_form
from distill.screen.console import make_console, printable

if TYPE_CHECKING:
    from distill.launch.on_ranks import Task

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a built-in one.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        callback=check_form,
        help="Values to replace, such as schedule.batch=32; list items by number, as in "
        "students.0.lr=1e-4. Write teacher:KEY=VALUE for the recipe of the teacher it trains.",
    ),
]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart.")
]
DataOption = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Train on the images of this folder.")
]
GpusOption = Annotated[
    int | None, typer.Option("--gpus", min=1, help="Local processes: GPUs, or CPU processes.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder for run folders.")]
NameOption = Annotated[
    str | None, typer.Option("--name", help="Name of the run folder; by default the recipe's.")
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Start over: remove what an earlier run of this name left.")
]
PlainOption = Annotated[bool, typer.Option("--plain", help="Lines instead of a live screen.")]
RestartsOption = Annotated[
    int,
    typer.Option(
        "--max-restarts", min=0, help="Times the job starts again by itself when a rank fails."
    ),
]
StoppedCodeOption = Annotated[
    int,
    typer.Option(
        "--stopped-code",
        min=0,
        max=125,
        help="Exit code where SIGTERM stopped the job before its end, for a scheduler that starts it again.",
    ),
]
AllowCodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Run code that the recipe or weights name outside the folder you stand in: of installed packages, beside them, in the run.",
    ),
]
CostsOption = Annotated[
    str | None,
    typer.Option(
        "--costs",
        metavar="FILE.json",
        help="Seconds per image of each network, as bench --json measures them, in place of FLOPs.",
    ),
]
RanksOption = Annotated[
    int,
    typer.Option("--ranks", min=1, help="Local processes that share the images; one per GPU."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def progress(text: str) -> None:
    """A line for people beside the output."""
    sys.stderr.write(printable(text) + "\n")


def say(text: str) -> None:
    """A line for people, as it is."""
    make_console().print(text, soft_wrap=True)


def with_data(recipe: str, overrides: Sequence[str] | None, data: Path | None) -> list[str]:
    """Overrides with ``--data`` applied to the recipe and to the teacher's recipe it may name."""
    from distill.recipe.reader import names_teacher_recipe

    texts = list(overrides or [])
    if data is None:
        return texts
    if not data.is_dir():
        raise RecipeError(f"--data {data}: not a folder", fix="Give a folder with images.")
    source = f"data.sources=[{{path: {json.dumps(str(data.absolute()))}}}]"
    is_for_two = names_teacher_recipe(recipe, texts)
    return [*texts, source, *([f"teacher:{source}"] if is_for_two else [])]


def allow_code(is_given: bool, recipe: str, *folders: Path) -> None:
    """Applies ``--allow-code``: whatever code a recipe names may run, and is looked for beside it and in ``folders`` too.

    The search path and the environment reach every rank.
    """
    if not is_given:
        return
    from distill.listing.outside_code import allow

    allow()
    sys.path.extend(str(folder.absolute()) for folder in (Path(recipe).parent, *folders))


def allow_code_of(network: Path, is_given: bool) -> None:
    """Applies ``--allow-code`` to a run folder, ``RUN:NAME`` or weights: code is looked for in the folder, and beside its recipe or it."""
    if not is_given:
        return
    from distill.evaluate.files import split_name

    folder = split_name(network)[0]
    job = folder / "job.json"
    recipe = json.loads(job.read_text())["request"]["recipe"] if job.is_file() else str(folder)
    allow_code(is_given, recipe, folder if folder.is_dir() else folder.parent)


def count_ranks(processes: int | str, requested: int | None) -> int:
    """Local processes: as requested, else as in the recipe."""
    from distill.launch.local import count_processes

    return count_processes(requested or processes)


def join_launch() -> None:
    """Makes this process a rank where it is a task of srun, mpirun or another scheduler."""
    from distill.launch.local import resume_command
    from distill.launch.on_ranks import become_rank

    become_rank(resume_command())


def on_ranks(task: "Task", num_ranks: int) -> Any:
    """What the task returns: on ranks that another launcher started, else on ``num_ranks`` of this machine."""
    from distill.launch.local import resume_command
    from distill.launch.on_ranks import run_on_ranks

    return run_on_ranks(task, num_ranks, resume_command())


def require_run(run: Path) -> None:
    """Refuses a folder that no job was prepared in.

    Raises:
        RecipeError: the folder is not a run folder.
    """
    if not (run / "job.json").is_file():
        fix = "Give a folder such as runs/quickstart."
        raise RecipeError(f"{run}: not a run folder", fix=fix)


def require_there(paths: list[Path]) -> list[Path]:
    """Returns the paths; refuses one that is not there and is no pattern.

    Raises:
        RecipeError: names it.
    """
    for path in paths:
        if not path.exists() and not any(mark in str(path) for mark in "*?[{~$"):
            fix = "Give folders with images, .tar shards, .txt lists or .parquet files."
            raise RecipeError(f"{path}: no such file or folder", fix=fix)
    return paths
