"""The verbs: parse, call, print, set the exit code. Imports nothing heavy until a verb needs it.

Exit codes: 0 done, or saved and stopped by SIGTERM; 1 failed; 2 wrong recipe or usage; 3 the machine
lacks something; 4 a rank died or hung; 130 saved and stopped by Ctrl-C. With ``--json`` standard output holds one JSON object and nothing else.
"""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from distill.cli.bench import bench
from distill.cli.data import data_app
from distill.cli.export import export
from distill.cli.options import (
    DataOption,
    DebugOption,
    FreshOption,
    GpusOption,
    JsonOption,
    NameOption,
    OutOption,
    OverridesArgument,
    PlainOption,
    RecipeArgument,
    RestartsOption,
    RunArgument,
    count_ranks,
    print_json,
    say,
    with_data,
)
from distill.cli.recipes import recipes_app
from distill.cli.weights import weights_app
from distill.errors import DataError, RecipeError, UserError
from distill.runfolder.files import is_full

if TYPE_CHECKING:
    from distill.launch.local import Options

HELP = """Train a whole family of vision backbones from one frozen teacher, in one job.

New here?  distill doctor → distill recipes copy quickstart my.yaml
           → distill check my.yaml → distill train my.yaml
"""
app = typer.Typer(
    help=HELP, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False
)
app.add_typer(recipes_app, name="recipes", rich_help_panel="Before you train")
app.add_typer(data_app, name="data", rich_help_panel="Data and weights")
app.add_typer(weights_app, name="weights", rich_help_panel="Data and weights")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and ends the process with its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(words, prog_name="distill", standalone_mode=True)
    except Exception as error:
        told = error if isinstance(error, UserError) else _unforeseen(error)
        report(told, is_debug="--debug" in words)
        sys.exit(told.exit_code)


def _unforeseen(error: Exception) -> UserError:
    """An error nobody wrote a message for, as one line."""
    reason = (str(error).strip().splitlines() or ["no message"])[0]
    if isinstance(error, OSError) and is_full(error):
        return UserError(
            f"{error.filename or 'a file'}: {error.strerror}",
            fix="Make room and run the same command again; what was saved is kept.",
        )
    return UserError(
        f"{type(error).__name__}: {reason}",
        fix="Run the same command with --debug to see where; if it is not your files, report it.",
    )


def report(error: UserError, *, is_debug: bool) -> None:
    """Writes the message and the next move to standard error; call while handling an error."""
    if is_debug:
        traceback.print_exc()
    sys.stderr.write(error.message + "\n")
    if error.fix:
        sys.stderr.write(f"Fix: {error.fix}\n")


def _version(is_wanted: bool | None) -> bool | None:
    if is_wanted:
        sys.stdout.write(f"distill {version('distill-family')}\n")
        raise typer.Exit
    return is_wanted


@app.callback()
def _root(
    show_version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = None,
) -> None:
    """Options of the command itself."""


@app.command(rich_help_panel="Before you train")
def doctor(as_json: JsonOption = False, debug: DebugOption = False) -> None:  # noqa: ARG001  # read by main
    """Check devices, libraries, decoders and disk; say how to fix what fails."""
    from distill.cli.doctor import examine

    findings = examine()
    if as_json:
        print_json([finding.to_json() for finding in findings])
    else:
        for finding in findings:
            say(f"{'ok ' if finding.is_ok else 'BAD'}  {finding.what}: {finding.found}")
            if finding.fix:
                say(f"     Fix: {finding.fix}")
    if not all(finding.is_ok for finding in findings):
        raise typer.Exit(3)


@app.command(rich_help_panel="Before you train")
def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    data: DataOption = None,
    gpus: GpusOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Validate a recipe, its data and its plan; name the line that is wrong and the likely fix."""
    from distill.recipe.keys import FamilyRecipe
    from distill.recipe.reader import load_job

    try:
        texts = with_data(recipe, overrides, data)
        loaded, teacher = load_job(recipe, texts, check_folders=True)

        from distill.job.prepare import check_data
        from distill.plan.flops import find_device  # these import torch
        from distill.plan.job import check_job, require_fit
        from distill.plan.teacher_source import heads_story
        from distill.train.device import has_gpu

        num_ranks = count_ranks(loaded.engine.processes, gpus)
        plans = check_job(loaded, teacher, num_ranks)
        if has_gpu(loaded.engine.device):
            for job in plans:
                require_fit(job, loaded, teacher, find_device("measured"))
        facts = check_data(loaded, teacher)
    except DataError as error:  # to a check, data that is not there is a wrong recipe
        raise RecipeError(error.message, fix=error.fix) from error
    names = (
        [s.label for s in loaded.students] if isinstance(loaded, FamilyRecipe) else ["a teacher"]
    )
    story = heads_story(loaded) if isinstance(loaded, FamilyRecipe) else None
    if as_json:
        found = {"recipe": loaded.name, "networks": names, "ranks": num_ranks, "sources": facts}
        found["heads"] = story
        print_json({**found, "plan": plans[-1].to_json()})
        return
    what = f"{loaded.name}: {', '.join(names)}" + (f" from {teacher.name}" if teacher else "")
    images = ", ".join(f"{source}: {count} images" for source, count in facts.items())
    said = [what, images, *([story] if story else []), f"good for {num_ranks} ranks"]
    say("; ".join(said) + "; nothing was started.")


@app.command(rich_help_panel="Before you train")
def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=1, help="Number of ranks; by default this machine's."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="h100, h200, a100, cpu, or measured: this machine's.")
    ] = "h100",
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Who trains where, who teaches how much, how long, how much memory. Trains nothing, needs no GPU.

    A recipe that names its teacher's arch is planned before the weights are there.
    """
    from distill.recipe.reader import load_job

    loaded, teacher = load_job(recipe, list(overrides or []))

    from distill.plan.flops import find_device
    from distill.plan.job import check_job, require_fit
    from distill.screen.tables import plan_tables

    assumed = find_device(device)
    num_ranks = count_ranks(loaded.engine.processes, ranks)
    plans = check_job(loaded, teacher, num_ranks, assumed, has_files=False)
    if as_json:
        print_json({**plans[-1].to_json(), "device": assumed.name})
    else:
        for each in plans:
            for table in plan_tables(each, assumed):
                Console().print(table)
    for job in plans:
        require_fit(job, loaded, teacher, assumed)


def _start(recipe: str, overrides: list[str], options: "Options", *, as_json: bool) -> None:
    from distill.launch.local import run

    if not as_json:
        raise typer.Exit(run(recipe, overrides, options))
    from distill.recipe.reader import load_job

    folder = options.out / (options.name or load_job(recipe, overrides)[0].name)
    with redirect_stdout(sys.stderr):
        code = run(recipe, overrides, options)
    if os.environ.get("RANK", "0") == "0":
        summary = folder / "summary.json"
        scores = json.loads(summary.read_text()) if code == 0 and summary.is_file() else None
        print_json({"run": str(folder), "exit_code": code, "summary": scores})
    raise typer.Exit(code)


@app.command(rich_help_panel="Train")
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    data: DataOption = None,
    gpus: GpusOption = None,
    out: OutOption = Path("runs"),
    name: NameOption = None,
    fresh: FreshOption = False,
    max_restarts: RestartsOption = 0,
    plain: PlainOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Distil every student of a recipe in one job. Run the same command again to resume."""
    from distill.launch.local import Options

    options = Options(
        processes=gpus,
        out=out,
        name=name,
        fresh=fresh,
        plain=plain or as_json,
        max_restarts=max_restarts,
    )
    _start(recipe, with_data(recipe, overrides, data), options, as_json=as_json)


@app.command(rich_help_panel="Train")
def pretrain(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    data: DataOption = None,
    gpus: GpusOption = None,
    out: OutOption = Path("runs"),
    name: NameOption = None,
    fresh: FreshOption = False,
    max_restarts: RestartsOption = 0,
    plain: PlainOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Train a teacher: self-supervised, then Gram anchoring."""
    from distill.launch.local import Options
    from distill.recipe.keys import TeacherRecipe
    from distill.recipe.reader import load_job

    texts = with_data(recipe, overrides, data)
    if not isinstance(load_job(recipe, texts)[0], TeacherRecipe):
        raise RecipeError(
            f"{recipe}: a family recipe has no stages to pretrain",
            fix=f"Use distill train {recipe}.",
        )
    options = Options(
        processes=gpus,
        out=out,
        name=name,
        fresh=fresh,
        plain=plain or as_json,
        max_restarts=max_restarts,
    )
    _start(recipe, texts, options, as_json=as_json)


@app.command(rich_help_panel="Train")
def watch(
    run: RunArgument,
    plain: PlainOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Show a running or finished job; needs only its run folder. Ctrl-C leaves, the job goes on."""
    import threading

    from distill.screen.watch import watch as follow

    _require_run(run)
    if as_json:
        status = run / "status.json"
        print_json(json.loads(status.read_text()) if status.is_file() else None)
        return
    console = Console()
    is_live = console.is_terminal and not plain
    try:
        follow(run, live=is_live, console=console, stop=threading.Event())
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _require_run(run: Path) -> None:
    if not (run / "job.json").is_file():
        fix = "Give a folder such as runs/quickstart."
        raise UserError(f"{run}: not a run folder", fix=fix)


@app.command("eval", rich_help_panel="Results")
def evaluate(
    run: RunArgument,
    over_steps: Annotated[
        bool,
        typer.Option(
            "--over-steps", help="Score the teacher in every kept checkpoint; draw progress.png."
        ),
    ] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option("--beside", help="With --over-steps: another run in the same picture."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Score students and teacher on held-out images by k-NN, and draw their features."""
    from distill.evaluate.summary import finish
    from distill.runfolder.status import StatusFile
    from distill.screen.tables import scores_table

    _require_run(run)
    if over_steps:
        return _score_steps([run, *(beside or [])], as_json=as_json)
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        summary = finish(run)
    status = StatusFile(run).read()
    if status is not None and status.message:
        sys.stderr.write(status.message + "\n")
    if as_json:
        print_json(summary)
    else:
        Console().print(scores_table(summary))
    return None


def _score_steps(runs: Sequence[Path], *, as_json: bool) -> None:
    from dataclasses import asdict

    from distill.evaluate.over_steps import draw_progress, score_steps

    scored = {}
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        for run in runs:
            _require_run(run)
            scored[run.name] = score_steps(run, say)
        picture = draw_progress(scored, runs[0] / "progress.png")
        say(f"wrote {picture}")
    if as_json:
        print_json({name: [asdict(m) for m in moments] for name, moments in scored.items()})


app.command("bench", rich_help_panel="Train")(bench)
app.command("export", rich_help_panel="Results")(export)
