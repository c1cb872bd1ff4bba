"""``distill eval``: scores and pictures of runs, scores of any weights."""

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from distill.cli.options import (
    AllowCodeOption,
    DebugOption,
    JsonOption,
    RanksOption,
    allow_code_of,
    join_launch,
    on_ranks,
    print_json,
    progress,
    require_run,
    require_there,
    say,
)
from distill.engine.variables import is_first, is_launched
from distill.errors import RecipeError, UserError
from distill.screen.console import make_console, printable

if TYPE_CHECKING:
    from distill.evaluate.scoring import Wanted
    from distill.protocols.images import Precision
    from distill.protocols.score import Protocol

Targets = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="RUN|WEIGHTS...",
        help="Run folders; with --data also exported folders and files of weights.",
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option("--precision", help="auto (bf16 for a large network on a GPU), fp32 or bf16."),
]


def evaluate(
    targets: Targets = None,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            help="agreement, knn, cost, logistic, fewshot, linear, retrieval; with --data seg, depth, correspondence.",
        ),
    ] = "agreement,knn",
    protocol: Annotated[str, typer.Option("--protocol", help="quick or dinov3.")] = "quick",
    precision: PrecisionOption = "auto",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="SRC", help="Score on these: class folders, pictures with maps."
        ),
    ] = None,
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="Score made-up images whose right scores are known."),
    ] = False,
    over_steps: Annotated[
        bool,
        typer.Option(
            "--over-steps", help="Score students and a trained teacher in every kept checkpoint."
        ),
    ] = False,
    beside: Annotated[
        list[Path] | None,
        typer.Option("--beside", help="With --over-steps: another run in the same picture."),
    ] = None,
    ranks: RanksOption = 1,
    allow: AllowCodeOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Score students and teacher on held-out images, say how near they are, and draw their features."""
    join_launch()
    paths = targets or []
    if self_test:
        return _test(_wanted(tasks, protocol)[0].protocol, as_json=as_json)
    if not paths:
        raise RecipeError("distill eval: nothing to score", fix="Give a run folder or weights.")
    _open(paths, allow, are_runs=data is None or over_steps)
    if over_steps:
        return _score_steps([*paths, *(beside or [])], as_json=as_json)
    wanted, unknown = _wanted(tasks, protocol, precision)
    if data is None:
        unknown += [f"--tasks {name}: give its pictures with --data SRC" for name in wanted.dense]
    for line in unknown:
        sys.stderr.write(printable(line) + "\n")
    score = _score_runs if data is None else partial(_score_files, data)
    code = score(paths, wanted, ranks, as_json=as_json)
    if code or unknown:
        raise typer.Exit(code or RecipeError.exit_code)
    return None


def _open(paths: Sequence[Path], allow: bool, *, are_runs: bool) -> None:
    """Refuses what is no run where runs are wanted; applies ``--allow-code`` to each run or network."""
    for path in paths:
        if are_runs:
            _require_run(path)
        allow_code_of(path, allow)


def _require_run(run: Path) -> None:
    """As ``require_run``, with the way to score weights where there are some."""
    if run.exists() and not (run / "job.json").is_file():
        fix = "Give a run folder, or score weights on your images: --data FOLDER."
        raise RecipeError(f"{run}: not a run folder", fix=fix)
    require_run(run)


def _wanted(tasks: str, protocol: str, precision: str = "auto") -> tuple["Wanted", list[str]]:
    """What to compute, and a line for every task that is not known."""
    from distill.evaluate.scoring import Wanted
    from distill.protocols.dense_tasks import DENSE
    from distill.protocols.images import PRECISIONS
    from distill.protocols.score import PROTOCOLS
    from distill.protocols.tasks import COST, TASKS, chosen_tasks

    known, unknown = chosen_tasks([name.strip() for name in tasks.split(",") if name.strip()])
    for option, given, allowed in (
        ("--protocol", protocol, PROTOCOLS),
        ("--precision", precision, PRECISIONS),
    ):
        if given not in allowed:
            fix = f"Take one of {', '.join(allowed)}."
            raise RecipeError(f"{option} {given}: not known", fix=fix)
    chosen, dense = (tuple(n for n in known if n in among) for among in (TASKS, DENSE))
    wanted = Wanted(
        chosen,
        cast("Protocol", protocol),
        has_cost=COST in known,
        dense=dense,
        precision=cast("Precision", precision),
    )
    return wanted, unknown


def _score_runs(runs: Sequence[Path], wanted: "Wanted", num_ranks: int, *, as_json: bool) -> int:
    """The exit code. Of several runs one that cannot be scored is named, and the others are scored."""
    from distill.runfolder.parked import PARKED_EXIT_CODE
    from distill.screen.tables import unfinished_students

    code, scored = 0, dict[str, Any]()
    for run in runs:
        try:
            summary = _score_run(run, wanted, num_ranks, as_json=as_json)
        except UserError as error:
            if len(runs) == 1:
                raise
            sys.stderr.write(printable(f"{error.message}\nFix: {error.fix}") + "\n")
            code = error.exit_code
            continue
        scored[str(run)] = summary
        if not as_json and is_first(os.environ):
            _print(summary, str(run) if len(runs) > 1 else "")
        if unfinished_students(summary):
            code = code or PARKED_EXIT_CODE
    if not is_first(os.environ):
        return code
    if as_json:
        print_json(scored if len(runs) > 1 else next(iter(scored.values())))
    return code


def _score_run(run: Path, wanted: "Wanted", num_ranks: int, *, as_json: bool) -> dict[str, Any]:
    from distill.report.summary import finish, finish_on_rank
    from distill.runfolder.lock import run_lock
    from distill.runfolder.status import StatusFile

    task = partial(finish_on_rank, run, wanted)
    if not is_first(os.environ):
        return on_ranks(task, num_ranks)
    with redirect_stdout(sys.stderr if as_json else sys.stdout), run_lock(run) as lock:
        lock.alone(wait_s=0.0)  # a job at work writes the same files
        is_alone = num_ranks == 1 and not is_launched(os.environ)
        summary = finish(run, wanted) if is_alone else on_ranks(task, num_ranks)
    status = StatusFile(run).read()
    if status is not None and status.message:
        sys.stderr.write(printable(status.message) + "\n")
    return summary


def _score_files(
    data: Path, paths: Sequence[Path], wanted: "Wanted", num_ranks: int, *, as_json: bool
) -> int:
    from distill.evaluate.files import evaluate_files

    require_there(list(paths))
    require_there([data])
    with redirect_stdout(sys.stderr):
        task = partial(evaluate_files, paths, data, wanted, progress)
        summary = on_ranks(task, num_ranks)
    if is_first(os.environ):
        print_json(summary) if as_json else _print(summary, "")
    return 0


def _print(summary: dict[str, Any], heading: str) -> None:
    from distill.screen.results import print_results

    if heading:
        say(heading)
    print_results(make_console(), summary)


def _test(protocol: "Protocol", *, as_json: bool) -> None:
    """Prints every check; exit code 1 where one fails."""
    from distill.evaluate.self_test import self_test

    checks = self_test(progress, protocol)
    if as_json:
        print_json([each.to_json() for each in checks])
    else:
        for each in checks:
            say(each.line)
    if not all(each.is_ok for each in checks):
        raise typer.Exit(1)


def _score_steps(runs: Sequence[Path], *, as_json: bool) -> None:
    """Students by their closeness to the teacher, and the teacher itself where it was trained here."""
    from dataclasses import asdict

    from distill.evaluate.over_steps import plot_progress, score_steps
    from distill.evaluate.students_over_steps import students_over_steps

    scored, students = {}, dict[str, Any]()
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        for run in runs:
            require_run(run)
            found = students_over_steps(run, say)
            students |= {f"{run.name}.students": [asdict(each) for each in found]} if found else {}
            try:
                scored[run.name] = score_steps(run, say)
            except UserError as error:
                if not found:
                    raise
                sys.stderr.write(printable(f"no scores of the teacher: {error.message}") + "\n")
        if scored:
            say(f"wrote {plot_progress(scored, runs[0] / 'progress.png')}")
    if as_json:
        moments = {name: [asdict(each) for each in steps] for name, steps in scored.items()}
        print_json({**moments, **students})
