"""``distill export``: students of a finished run for Hugging Face, timm, Meta's code, ONNX or their factory.

Nothing heavy is imported until the verb runs; ``distill.cli.app`` adds the verb to the command line.
"""

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.cli.options import (
    AllowCodeOption,
    DebugOption,
    JsonOption,
    allow_code_of,
    progress,
    require_run,
    require_there,
    say,
)
from distill.errors import RecipeError, UserError
from distill.runfolder.parked import read_parked

if TYPE_CHECKING:
    from distill.export.card import Inputs
    from distill.export.choice import Choice
    from distill.export.export import Exported
    from distill.recipe.keys import FamilyRecipe, TeacherRecipe


class WeightLayout(StrEnum):
    """Published layouts of the same weights."""

    HF = "hf"
    META = "meta"
    TIMM = "timm"


class Precision(StrEnum):
    """Number formats of the weights in the file."""

    FP32 = "fp32"
    BF16 = "bf16"


HeadOption = Annotated[
    str | None,
    typer.Option("--with-head", help="Add a classifier, knn or linear, fitted on --labels."),
]
LabelsOption = Annotated[
    Path | None,
    typer.Option("--labels", metavar="SRC", help="Class folders, or a table or shards."),
]
ProtocolOption = Annotated[
    str, typer.Option("--protocol", help="Of the classifier's score: quick or dinov3.")
]
Int8Option = Annotated[
    bool, typer.Option("--int8", help="With --to onnx: a graph in int8 beside it, measured.")
]
CalibrateOption = Annotated[
    Path | None,
    typer.Option("--calibrate", metavar="SRC", help="With --int8: images, not the run's."),
]


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="[hf|timm|meta|onnx|factory|NAME]",
            help="The library that is to read the files, or a format that an installed package adds.",
        ),
    ] = None,
    student: Annotated[
        list[str] | None,
        typer.Option(
            "--student", help="One student, or 'teacher'; repeat for more. By default all students."
        ),
    ] = None,
    dtype: Annotated[
        Precision, typer.Option("--dtype", help="Number format of the weights in the file.")
    ] = Precision.FP32,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder for the results; by default RUN/export/FORMAT."
        ),
    ] = None,
    with_head: HeadOption = None,
    labels: LabelsOption = None,
    protocol: ProtocolOption = "quick",
    int8: Int8Option = False,
    calibrate: CalibrateOption = None,
    allow: AllowCodeOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Write a student for Hugging Face, timm, Meta, ONNX or its factory, and verify the outputs agree."""
    from distill.evaluate.export_choice import require
    from distill.export.choice import Choice

    choice = Choice(to, with_head, labels, protocol, int8, calibrate, dtype.value)
    folders = _chosen(run, student or [])
    formats = require(choice)
    require_there([each for each in (labels, calibrate) if each is not None])
    allow_code_of(run, allow)
    choice.require_room(folders)

    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        finished = _export_all(run, folders, choice, out, is_quiet=as_json)
    if as_json:
        summary: dict[str, Any] = {"run": str(run), "to": formats, "dtype": dtype.value}
        summary["exported"] = [each.to_json() for each in finished]
        sys.stdout.write(json.dumps(summary, indent=2) + "\n")


def _export_all(
    run: Path, folders: Mapping[str, Path], choice: "Choice", out: Path | None, *, is_quiet: bool
) -> "list[Exported]":
    """Every network in every format, each complete or not there."""
    from distill.evaluate.export_choice import exporters
    from distill.export.export import export_network
    from distill.job.origin import background_of
    from distill.job.stored_recipes import read_recipes
    from distill.job.to_data import decoding_of
    from distill.protocols.images import Preparation

    recipes, scores = read_recipes(run), _read_json(run / "summary.json")
    clear, finished = decoding_of(recipes[0].data).background, list["Exported"]()
    for name, folder in folders.items():
        background, inputs = (
            background_of(run, name, folder, recipes, scores),
            _inputs(recipes[0], name),
        )
        usual = Preparation(inputs.size, inputs.mean, inputs.std, clear)
        for exporter in exporters(choice, run, (name, folder), usual, progress):
            target = _target(run, out, exporter.name, has_head=choice.head is not None) / name
            given = (name, folder, target, exporter, choice.dtype, background, inputs)
            finished.append(export_network(*given))
            if not is_quiet:
                _show(finished[-1], background.record)
    return finished


def _show(done: "Exported", record: Mapping[str, Any]) -> None:
    parked = f"; parked {record['parked']}" if "parked" in record else ""
    size = done.num_bytes / 1e6
    say(f"{done.name}: {done.folder}, {size:.1f} MB; {done.parity.describe()}{parked}")
    for line in (done.measured.clause, *done.measured.warnings):
        if line:
            say(f"  {line}")


def _target(run: Path, out: Path | None, form: str, *, has_head: bool) -> Path:
    """Folder of the networks of a format; with a classifier there are several formats."""
    return (out / form if has_head else out) if out else run / "export" / form


def _chosen(run: Path, requested: Sequence[str]) -> dict[str, Path]:
    """Folder of each network to export, in the order requested; all students when none is named.

    Raises:
        RecipeError: not a run, or no such student.
        UserError: nothing finished in it.
    """
    require_run(run)
    students = {
        path.parent.name: path.parent for path in sorted((run / "students").glob("*/config.json"))
    }
    if not requested:
        if not students:
            raise _no_students(run)
        return students
    chosen = {}
    for name in requested:
        parked = None if name in students else read_parked(run, name)
        if parked is not None:
            raise UserError(
                f"--student {name}: was never trained, it is parked {parked.describe()}",
                fix="Name another one.",
            )
        if name == "teacher":
            chosen[name] = _existing_teacher(run)
        elif name in students:
            chosen[name] = students[name]
        elif not students:
            raise _no_students(run)
        else:
            close = difflib.get_close_matches(name, [*students, "teacher"], n=1)
            hint = f" - did you mean {close[0]!r}?" if close else ""
            raise RecipeError(
                f"--student {name}: not in {run}{hint}",
                fix=f"Name one of: {', '.join([*students, 'teacher'])}.",
            )
    return chosen


def _no_students(run: Path) -> UserError:
    if (run / "teacher" / "config.json").is_file() and not _is_family(run):
        return UserError(f"{run}: trained a teacher and no students", fix="Add --student teacher.")
    resume = json.loads((run / "job.json").read_text(encoding="utf-8"))["request"]["resume_command"]
    return UserError(
        f"{run}: has no finished students yet; they are written after the last step",
        fix=f"Let the run finish: {resume}",
    )


def _read_recipe(run: Path) -> "FamilyRecipe | TeacherRecipe":
    """The recipe as the run resolved it; it lies in the run folder, wherever that was copied to."""
    from distill.listing.document import RESOLVED
    from distill.recipe.reader import load_recipe

    return load_recipe(run / RESOLVED)


def _is_family(run: Path) -> bool:
    from distill.recipe.keys import FamilyRecipe

    return isinstance(_read_recipe(run), FamilyRecipe)


def _existing_teacher(run: Path) -> Path:
    folder = _teacher_folder(run, _read_recipe(run))
    if not folder.exists():
        raise UserError(
            f"--student teacher: {folder} is missing",
            fix="Let the run train its teacher first, or put the teacher's weights there.",
        )
    return folder


def _teacher_folder(run: Path, recipe: "FamilyRecipe | TeacherRecipe") -> Path:
    """Where the teacher's weights lie, or lay: trained in this run, or named by the recipe."""
    from distill.recipe.keys import FamilyRecipe

    if isinstance(recipe, FamilyRecipe) and recipe.teacher.weights is not None:
        return Path(recipe.teacher.weights)
    return run / "teacher"


def _inputs(recipe: "FamilyRecipe | TeacherRecipe", name: str) -> "Inputs":
    from distill.export.card import Inputs
    from distill.recipe.keys import FamilyRecipe

    size = recipe.crops.input_size
    if isinstance(recipe, FamilyRecipe):
        size = recipe.input_size_of(name)
    return Inputs(size, recipe.data.mean, recipe.data.std)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty when there is no file, as beside weights from elsewhere."""
    from distill.weights.containers import read_object

    return read_object(path) if path.is_file() else {}
