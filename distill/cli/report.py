"""``distill report``, ``runs``, ``compare`` and ``log``: what runs hold, as a page, as tables and in trackers."""

import sys
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

RunsArgument = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Run folders, such as runs/quickstart.")
]


def report(
    runs: RunsArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page; by default report.html in the first run."),
    ] = None,
    no_pictures: Annotated[
        bool, typer.Option("--no-pictures", help="Leave pictures of images out.")
    ] = False,
    pictures: Annotated[
        int | None,
        typer.Option("--pictures", min=1, max=16, help="Plot so many pictures anew first."),
    ] = None,
    allow: AllowCodeOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Write one HTML page of a run, or of several side by side; it loads nothing and sends nothing."""
    from distill.errors import RecipeError
    from distill.report.page import REPORT, write_page

    for run in runs:
        require_run(run)
    page = out or runs[0] / REPORT
    if not page.parent.is_dir():
        raise RecipeError(f"--out {page}: no folder {page.parent}", fix="Make it first.")
    for run in runs if pictures else ():
        from distill.report.summary import replot_pictures

        allow_code_of(run, allow)
        for line in replot_pictures(run, pictures or 0):
            sys.stderr.write(printable(line) + "\n")
    size = write_page(runs, page, has_pictures=not no_pictures)
    if as_json:
        print_json({"page": str(page), "bytes": size})
    else:
        say(f"wrote {page} ({size / 1e3:,.0f} kB)")


def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where runs are; by default runs.")
    ] = Path("runs"),
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """List the runs in a folder: state, time, scores."""
    from distill.errors import RecipeError
    from distill.report.compare import find_runs, row_of, runs_table
    from distill.report.run_record import read_run

    if not folder.is_dir():
        raise RecipeError(f"{folder}: no such folder", fix="Give the folder that holds runs.")
    rows = [row_of(path, read_run(path)) for path in find_runs(folder)]
    if as_json:
        print_json({"runs": rows})
    elif rows:
        make_console().print(runs_table(rows))
    else:
        say(f"no run in {folder}")


def compare(
    runs: RunsArgument,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Show in which keys of their recipes and in which scores runs differ."""
    from distill.errors import RecipeError
    from distill.report.compare import comparison, comparison_tables
    from distill.report.run_record import read_run

    if len(runs) < 2:
        raise RecipeError("compare takes two runs or more", fix="Name another run folder.")
    for run in runs:
        require_run(run)
    found = comparison([read_run(run) for run in runs])
    if as_json:
        print_json(found)
        return
    console = make_console()
    for table in comparison_tables(found):
        console.print(table)


def log(
    run: RunArgument,
    to: Annotated[
        str, typer.Option("--to", metavar="[tensorboard|wandb|mlflow|trackio]", help="The tracker.")
    ],
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Hand the metrics of a run to a tracker: rows that it has not had, in its run of before."""
    import threading

    from distill.errors import RecipeError
    from distill.screen.follower import follow
    from distill.screen.trackers import TRACKERS

    require_run(run)
    if to not in TRACKERS:
        raise RecipeError(f"--to {to}: not a tracker", fix=f"Give one of: {', '.join(TRACKERS)}.")
    stop = threading.Event()
    stop.set()
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        num_rows = follow(run, to, stop)
    if as_json:
        print_json({"run": str(run), "tracker": to, "rows": num_rows})
    else:
        say(f"{to} has {num_rows:,} rows more of {run}")
