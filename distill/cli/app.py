"""The verbs: parse, call, print, set the exit code. Imports nothing heavy until a verb needs it.

Exit codes: 0 done, or saved and stopped by SIGTERM; 1 failed; 2 wrong recipe or usage; 3 the machine
lacks something; 4 a rank died or hung; 5 finished with a parked student; 130 saved and stopped by Ctrl-C. With ``--json`` standard output holds one JSON object and nothing else.
"""

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from distill.cli.before import check, doctor, plan
from distill.cli.bench import bench_app
from distill.cli.curation import curate, embed
from distill.cli.curation_choices import dedup, manifest, retrieve
from distill.cli.curation_choices import report as report_choice
from distill.cli.data import data_app
from distill.cli.export import export
from distill.cli.launch import launch_app
from distill.cli.look import look
from distill.cli.recipes import recipes_app
from distill.cli.report import compare, log, runs
from distill.cli.report import report as report_page
from distill.cli.results import evaluate
from distill.cli.schema import explain, schema
from distill.cli.training import accept_any, accept_teacher, training_verb, watch
from distill.cli.usage_errors import is_usage, usage_problem
from distill.cli.weights import weights_app
from distill.errors import RecipeError, UserError
from distill.runfolder.files import is_full
from distill.screen.console import escaped_output, printable

HELP = """Train a family of vision backbones from one frozen teacher, in one job.

New here?  distill doctor → distill recipes copy quickstart my.yaml
           → distill check my.yaml → distill train my.yaml
"""
app = typer.Typer(
    help=HELP, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False
)
data_app.command("embed")(embed)
data_app.command("dedup")(dedup)
data_app.command("curate")(curate)
data_app.command("retrieve")(retrieve)
data_app.command("manifest")(manifest)
data_app.command("report")(report_choice)
app.add_typer(recipes_app, name="recipes", rich_help_panel="Before you train")
app.add_typer(data_app, name="data", rich_help_panel="Data and weights")
app.add_typer(weights_app, name="weights", rich_help_panel="Data and weights")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and ends the process with its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    with escaped_output():
        try:
            code = app(words, prog_name="distill", standalone_mode=False)
        except typer.Abort:
            sys.exit(1)
        except Exception as error:
            problem = _problem_of(error, words)
            if problem.message:
                report(problem, is_debug="--debug" in words)
            sys.exit(problem.exit_code)
        sys.exit(code if isinstance(code, int) else 0)


def _problem_of(error: Exception, words: Sequence[str]) -> UserError:
    """An error as people read it; without a message where its help was printed."""
    if isinstance(error, UserError):
        from distill.listing.yaml_causes import with_cause

        return with_cause(error)
    if not is_usage(error):
        return _unforeseen(error)
    if type(error).__name__ == "NoArgsIsHelpError":  # a group without a word: its help
        sys.stderr.write(f"{error}\n")
        return RecipeError("")
    return usage_problem(error, words)


def _unforeseen(error: Exception) -> UserError:
    """An unexpected error as one line."""
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
        sys.stderr.write(printable(traceback.format_exc()))
    sys.stderr.write(printable(error.message) + "\n")
    if error.fix:
        sys.stderr.write(printable(f"Fix: {error.fix}\n"))


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


BEFORE, TRAIN, RESULTS = "Before you train", "Train", "Results"
app.command("doctor", rich_help_panel=BEFORE)(doctor)
app.command("check", rich_help_panel=BEFORE)(check)
app.command("plan", rich_help_panel=BEFORE)(plan)
app.command("explain", rich_help_panel=BEFORE)(explain)
app.command("schema", rich_help_panel=BEFORE)(schema)
app.command(
    "train",
    rich_help_panel=TRAIN,
    help="Distil every student of a recipe in one job. Run the same command again to resume.",
)(training_verb(accept_any))
app.command(
    "pretrain",
    rich_help_panel=TRAIN,
    help="Train a teacher: self-supervised, then Gram anchoring.",
)(training_verb(accept_teacher))
app.command("watch", rich_help_panel=TRAIN)(watch)
app.command("eval", rich_help_panel=RESULTS)(evaluate)
app.command("look", rich_help_panel=RESULTS)(look)
app.command("report", rich_help_panel=RESULTS)(report_page)
app.command("runs", rich_help_panel=RESULTS)(runs)
app.command("compare", rich_help_panel=RESULTS)(compare)
app.command("log", rich_help_panel=RESULTS)(log)
app.add_typer(launch_app, name="launch", rich_help_panel=TRAIN)
app.add_typer(bench_app, name="bench", rich_help_panel=TRAIN)
app.command("export", rich_help_panel=RESULTS)(export)
