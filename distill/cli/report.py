"""``distill report``, ``runs`` and ``compare``: what runs hold, as a page and as tables."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import DebugOption, JsonOption, print_json, require_run, say

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
    size = write_page(runs, page, has_pictures=not no_pictures)
    if as_json:
        print_json({"page": str(page), "bytes": size})
    else:
        say(f"wrote {page} ({size / 1e3:,.0f} kB)")
