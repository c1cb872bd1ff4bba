"""``distill train``, ``pretrain`` and ``watch``: start a job, follow one."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.options import (
    AllowCodeOption,
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
    StoppedCodeOption,
    allow_code,
    print_json,
    require_run,
    say,
    with_data,
)
from distill.errors import RecipeError, SetupError
from distill.runfolder.parked import PARKED_EXIT_CODE
from distill.screen.console import make_console

if TYPE_CHECKING:
    from distill.launch.local import Options


def _start(recipe: str, overrides: list[str], options: "Options", *, as_json: bool) -> None:
    from distill.launch.local import resume_command, run
    from distill.launch.task import run_as_task
    from distill.recipe.reader import load_job

    code = run_as_task(
        resume_command(),
        options.processes,
        lambda: load_job(recipe, overrides)[0].engine,
        options.stopped_code,
    )
    if code is not None:
        raise typer.Exit(code)
    if not as_json:
        raise typer.Exit(run(recipe, overrides, options))
    folder = options.out / (options.name or load_job(recipe, overrides)[0].name)
    with redirect_stdout(sys.stderr):
        code = run(recipe, overrides, options)
    if os.environ.get("RANK", "0") == "0":
        summary = folder / "summary.json"
        is_finished = code in {0, PARKED_EXIT_CODE} and summary.is_file()
        scores = json.loads(summary.read_text()) if is_finished else None
        print_json({"run": str(folder), "exit_code": code, "summary": scores})
    raise typer.Exit(code)


def training_verb(accept: Callable[[str, list[str]], None]) -> Callable[..., None]:
    """The command function of a verb that trains; ``accept`` refuses recipes that the verb is not for."""

    def verb(
        recipe: RecipeArgument,
        overrides: OverridesArgument = None,
        data: DataOption = None,
        gpus: GpusOption = None,
        out: OutOption = Path("runs"),
        name: NameOption = None,
        fresh: FreshOption = False,
        max_restarts: RestartsOption = 0,
        stopped_code: StoppedCodeOption = 0,
        plain: PlainOption = False,
        allow: AllowCodeOption = False,
        as_json: JsonOption = False,
        debug: DebugOption = False,  # noqa: ARG001  # read by main
    ) -> None:
        from distill.launch.local import Options

        allow_code(allow, recipe)
        texts = with_data(recipe, overrides, data)
        accept(recipe, texts)
        options = Options(
            processes=gpus,
            out=out,
            name=name,
            fresh=fresh,
            plain=plain or as_json,
            max_restarts=max_restarts,
            stopped_code=stopped_code,
        )
        _start(recipe, texts, options, as_json=as_json)

    return verb


def accept_any(recipe: str, overrides: list[str]) -> None:
    """``train`` takes every recipe: a teacher's stages are trained, a family is distilled."""


def accept_teacher(recipe: str, overrides: list[str]) -> None:
    """``pretrain`` takes recipes of teachers.

    Raises:
        RecipeError: the recipe is a family's.
    """
    from distill.recipe.keys import TeacherRecipe
    from distill.recipe.reader import load_job

    if not isinstance(load_job(recipe, overrides)[0], TeacherRecipe):
        raise RecipeError(
            f"{recipe}: a family recipe has no stages to pretrain",
            fix=f"Use distill train {recipe}.",
        )


def watch(
    run: RunArgument,
    plain: PlainOption = False,
    web: Annotated[
        bool, typer.Option("--web", help="Show the page of the run in a browser of this machine.")
    ] = False,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="With --web; 0 takes a free one.")
    ] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Show a running or finished job; needs only its run folder. Ctrl-C leaves, the job goes on."""
    import threading

    from distill.screen.watch import watch as follow

    require_run(run)
    if web:
        _serve(run, port)
        return
    if as_json:
        status = run / "status.json"
        print_json(json.loads(status.read_text()) if status.is_file() else None)
        return
    console = make_console()
    is_live = console.is_terminal and not plain
    try:
        follow(run, live=is_live, console=console, stop=threading.Event())
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _serve(run: Path, port: int) -> None:
    """Shows the page of a run in a browser until Ctrl-C."""
    from distill.report.live import LOOPBACK, open_page

    try:
        page = open_page(run, port=port)
    except OSError as error:
        fix = "Give another --port, or none."
        raise SetupError(f"--port {port}: {LOOPBACK} cannot listen ({error})", fix=fix) from error
    say(f"{page.address}   (this machine only; Ctrl-C ends the page, the job goes on)")
    with suppress(KeyboardInterrupt):
        page.serve()
