"""``distill eval``: scores and pictures of a run."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import (
    AllowCodeOption,
    DebugOption,
    JsonOption,
    RunArgument,
    allow_code_of,
    print_json,
    require_run,
    say,
)
from distill.screen.console import make_console, printable


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
    allow: AllowCodeOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Score students and teacher on held-out images by k-NN, and draw their features."""
    require_run(run)
    from distill.report.summary import finish
    from distill.runfolder.lock import run_lock
    from distill.runfolder.parked import PARKED_EXIT_CODE
    from distill.runfolder.status import StatusFile
    from distill.screen.results import print_results
    from distill.screen.tables import unfinished_students

    allow_code_of(run, allow)
    if over_steps:
        return _score_steps([run, *(beside or [])], as_json=as_json)
    with redirect_stdout(sys.stderr if as_json else sys.stdout), run_lock(run) as lock:
        lock.alone(wait_s=0.0)  # a job at work writes the same files
        summary = finish(run)
    status = StatusFile(run).read()
    if status is not None and status.message:
        sys.stderr.write(printable(status.message) + "\n")
    if as_json:
        print_json(summary)
    else:
        print_results(make_console(), summary)
    if unfinished_students(summary):
        raise typer.Exit(PARKED_EXIT_CODE)
    return None


def _score_steps(runs: Sequence[Path], *, as_json: bool) -> None:
    from dataclasses import asdict

    from distill.report.over_steps import plot_progress, score_steps

    scored = {}
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        for run in runs:
            require_run(run)
            scored[run.name] = score_steps(run, say)
        picture = plot_progress(scored, runs[0] / "progress.png")
        say(f"wrote {picture}")
    if as_json:
        print_json({name: [asdict(m) for m in moments] for name, moments in scored.items()})
