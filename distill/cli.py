"""The verbs: parse, call, print, set the exit code. Imports nothing heavy until a verb needs it.

Exit codes: 0 done, or saved and stopped by SIGTERM; 1 failed; 2 wrong recipe or usage; 3 the machine
lacks something; 4 a rank died or hung; 130 saved and stopped by Ctrl-C. With ``--json`` standard output holds one JSON object and nothing else.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from distill.data_cli import bench_loader, data_app, loader_table
from distill.disk import is_full
from distill.errors import DataError, RecipeError, UserError
from distill.export_cli import Precision, WeightLayout, export

if TYPE_CHECKING:
    from distill.launch import Options

HELP = """Train a whole family of vision backbones from one frozen teacher, in one job.

New here?  distill doctor → distill recipes copy quickstart my.yaml
           → distill check my.yaml → distill train my.yaml
"""
app = typer.Typer(
    help=HELP, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False
)
recipes_app = typer.Typer(help="List, show and copy the built-in recipes.", no_args_is_help=True)
weights_app = typer.Typer(
    help="Inspect and convert weights; fit the heads a released teacher lacks.",
    no_args_is_help=True,
)
app.add_typer(recipes_app, name="recipes", rich_help_panel="Before you train")
app.add_typer(data_app, name="data", rich_help_panel="Data and weights")
app.add_typer(weights_app, name="weights", rich_help_panel="Data and weights")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a built-in one.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
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
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


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


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


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


def _with_data(recipe: str, overrides: Sequence[str] | None, data: Path | None) -> list[str]:
    """Overrides with ``--data`` applied to the recipe and to the teacher's recipe it may name."""
    from distill.recipe_file import names_teacher_recipe

    texts = list(overrides or [])
    if data is None:
        return texts
    if not data.is_dir():
        raise DataError(f"--data {data}: not a folder", fix="Give a folder with images.")
    source = f"data.sources=[{{path: {json.dumps(str(data.absolute()))}}}]"
    is_for_two = names_teacher_recipe(recipe, texts)
    return [*texts, source, *([f"teacher:{source}"] if is_for_two else [])]


def _start(recipe: str, overrides: list[str], options: "Options", *, as_json: bool) -> None:
    from distill.launch import run

    if not as_json:
        raise typer.Exit(run(recipe, overrides, options))
    from distill.recipe_file import load_job

    folder = options.out / (options.name or load_job(recipe, overrides)[0].name)
    with redirect_stdout(sys.stderr):
        code = run(recipe, overrides, options)
    if os.environ.get("RANK", "0") == "0":
        summary = folder / "summary.json"
        scores = json.loads(summary.read_text()) if code == 0 and summary.is_file() else None
        _print_json({"run": str(folder), "exit_code": code, "summary": scores})
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
    from distill.launch import Options

    options = Options(
        processes=gpus,
        out=out,
        name=name,
        fresh=fresh,
        plain=plain or as_json,
        max_restarts=max_restarts,
    )
    _start(recipe, _with_data(recipe, overrides, data), options, as_json=as_json)


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
    from distill.launch import Options
    from distill.recipe import TeacherRecipe
    from distill.recipe_file import load_job

    texts = _with_data(recipe, overrides, data)
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


@weights_app.command("inspect")
def inspect_weights(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="A folder, a .safetensors or a .pth file.")
    ],
    check_values: Annotated[
        bool, typer.Option("--check-values", help="Read every number and look for NaN.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Name what a file of weights is, without executing anything in it."""
    from distill.console import inspection_table
    from distill.weights import inspect

    found = inspect(path, check_values=check_values)
    if as_json:
        _print_json(found.to_json())
    else:
        Console().print(inspection_table(found))


@weights_app.command("convert")
def convert_weights(
    source: Annotated[Path, typer.Argument(metavar="SOURCE")],
    target: Annotated[Path, typer.Argument(metavar="TARGET")],
    layout: Annotated[WeightLayout, typer.Option("--to", help="Whose names the tensors get.")],
    dtype: Annotated[Precision, typer.Option("--dtype")] = Precision.FP32,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Write a backbone in another layout: a folder for hf and timm, a .pth file for meta."""
    import torch

    from distill.console import inspection_table
    from distill.weights import convert

    kind = torch.bfloat16 if dtype == Precision.BF16 else torch.float32
    found = convert(source, target, layout=layout.value, dtype=kind)
    if as_json:
        _print_json(found.to_json())
    else:
        Console().print(inspection_table(found))


@weights_app.command("fit-heads")
def fit_heads(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    data: DataOption = None,
    gpus: GpusOption = None,
    out: OutOption = Path("runs"),
    name: NameOption = None,
    fresh: FreshOption = False,
    plain: PlainOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Learn DINO and iBOT heads on a frozen teacher, as the first phase of a family's job.

    The recipe says teacher.heads: fit. ``distill train`` with the same recipe goes on from there;
    the file can be given to other recipes as teacher.heads.
    """
    from distill.launch import Options, run
    from distill.prepare import FITTED_HEADS
    from distill.recipe import HEADS_PHASE, FamilyRecipe
    from distill.recipe_file import load_job

    texts = _with_data(recipe, overrides, data)
    loaded = load_job(recipe, texts)[0]
    if not isinstance(loaded, FamilyRecipe) or loaded.teacher.heads_mode != "fit":
        raise RecipeError(f"{recipe}: has no heads to fit", fix="Write teacher.heads: fit in it.")
    options = Options(gpus, out, name, fresh, plain, until=HEADS_PHASE)
    code = run(recipe, texts, options)
    if code == 0:
        _say(f"wrote {out / (name or loaded.name) / FITTED_HEADS}")
    raise typer.Exit(code)


@app.command(rich_help_panel="Train")
def watch(
    run: RunArgument,
    plain: PlainOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Show a running or finished job; needs only its run folder. Ctrl-C leaves, the job goes on."""
    import threading

    from distill.console import watch as follow

    _require_run(run)
    if as_json:
        status = run / "status.json"
        _print_json(json.loads(status.read_text()) if status.is_file() else None)
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


@app.command(rich_help_panel="Train")
def bench(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Local processes; by default the recipe's.")
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            "--against", help="published, separate, saving, several with commas, or none."
        ),
    ] = "published,separate",
    steps: Annotated[int, typer.Option("--steps", min=10, help="Measured steps per mode.")] = 30,
    warmup: Annotated[int, typer.Option("--warmup", min=1, help="Steps before them.")] = 10,
    sleep: Annotated[
        float | None,
        typer.Option(
            "--sleep", min=0.01, help="Networks sleep instead; a planned step lasts this."
        ),
    ] = None,
    slow: Annotated[
        str | None, typer.Option("--slow", help="RANK=FACTOR: with --sleep, a slow rank.")
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="synthetic images, or the recipe's.")
    ] = "synthetic",
    images: Annotated[int, typer.Option("--images", min=1, help="loader: images per block.")] = 256,
    json_file: Annotated[
        Path | None, typer.Option("--json-file", metavar="FILE", help="Write the figures here.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Write a PNG of one step.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Measure a family's throughput against the published procedure and separate jobs.

    ``distill bench loader RECIPE`` measures the image loader against Pillow instead.
    """
    from distill.recipe import FamilyRecipe
    from distill.recipe_file import load_job

    texts = list(overrides or [])
    if recipe == "loader" and texts:
        _bench_loader(texts[0], texts[1:], data, images, json_file, as_json=as_json)
        return
    loaded = load_job(recipe, texts)[0]
    modes = [] if against == "none" else against.split(",")
    if not isinstance(loaded, FamilyRecipe):
        raise RecipeError(f"{recipe}: not a family recipe", fix="Give one with students.")
    if not set(modes) <= {"published", "separate", "saving"}:
        raise RecipeError(
            f"--against {against}: not known",
            fix="Write published, separate, saving, several with commas, or none.",
        )
    if "saving" in modes and sleep is not None:
        raise RecipeError("--against saving: who sleeps has no state", fix="Leave --sleep away.")
    slow_rank, slow_factor = _slow(slow)
    if slow_rank is not None and sleep is None:
        raise RecipeError("--slow needs --sleep", fix="Add --sleep 0.5.")
    if data not in ("synthetic", "recipe"):
        raise RecipeError(f"--data {data}: not known", fix="Write synthetic or recipe.")

    from distill.bench import Request, measure
    from distill.bench_report import draw, save_report, tables

    num_ranks = _num_ranks(loaded.engine.processes, ranks)
    request = Request(
        recipe, tuple(texts), tuple(modes), num_ranks, steps, warmup, sleep, slow_rank, slow_factor
    )
    with tempfile.TemporaryDirectory() as folder:
        if data == "recipe":
            from distill.prepare import training_index

            training_index(loaded.data, Path("runs/.photographs")).save(Path(folder) / "index")
            request = replace(request, index=str(Path(folder) / "index"))
        report = measure(request)
    if json_file is not None:
        save_report(report, json_file)
    if picture is not None:
        draw(report, picture)
    if as_json:
        _print_json(report)
    else:
        for table in tables(report):
            Console().print(table)


def _bench_loader(
    recipe: str,
    overrides: list[str],
    data: str,
    images: int,
    json_file: Path | None,
    *,
    as_json: bool,
) -> None:
    if data not in ("synthetic", "recipe"):
        raise RecipeError(f"--data {data}: not known", fix="Write synthetic or recipe.")
    report = bench_loader(recipe, overrides, uses_recipe=data == "recipe", images=images)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if as_json:
        _print_json(report)
    else:
        Console().print(loader_table(report))


def _slow(text: str | None) -> tuple[int | None, float]:
    if text is None:
        return None, 1.0
    rank, _, factor = text.partition("=")
    try:
        return int(rank), float(factor)
    except ValueError as error:
        raise RecipeError(f"--slow {text}: not RANK=FACTOR", fix="Write --slow 2=1.5.") from error


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
    from distill.recipe import FamilyRecipe
    from distill.recipe_file import load_job

    try:
        texts = _with_data(recipe, overrides, data)
        loaded, teacher = load_job(recipe, texts, check_folders=True)

        from distill.cost import find_device  # these import torch
        from distill.job_plans import check_job, require_fit
        from distill.prepare import check_data, has_gpu
        from distill.teacher_source import heads_story

        num_ranks = _num_ranks(loaded.engine.processes, gpus)
        plans = check_job(loaded, teacher, num_ranks)
        if has_gpu(loaded):
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
        _print_json({**found, "plan": plans[-1].to_json()})
        return
    what = f"{loaded.name}: {', '.join(names)}" + (f" from {teacher.name}" if teacher else "")
    images = ", ".join(f"{source}: {count} images" for source, count in facts.items())
    said = [what, images, *([story] if story else []), f"good for {num_ranks} ranks"]
    _say("; ".join(said) + "; nothing was started.")


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
    from distill.recipe_file import load_job

    loaded, teacher = load_job(recipe, list(overrides or []))

    from distill.console import plan_tables  # after the recipe is right: these import torch
    from distill.cost import find_device
    from distill.job_plans import check_job, require_fit

    assumed = find_device(device)
    num_ranks = _num_ranks(loaded.engine.processes, ranks)
    plans = check_job(loaded, teacher, num_ranks, assumed, has_files=False)
    if as_json:
        _print_json({**plans[-1].to_json(), "device": assumed.name})
    else:
        for each in plans:
            for table in plan_tables(each, assumed):
                Console().print(table)
    for job in plans:
        require_fit(job, loaded, teacher, assumed)


def _num_ranks(processes: int | str, asked: int | None) -> int:
    from distill.launch import count_processes

    return count_processes(asked or processes)


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
    from distill.console import scores_table
    from distill.finish import finish
    from distill.metrics import StatusFile

    _require_run(run)
    if over_steps:
        return _score_steps([run, *(beside or [])], as_json=as_json)
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        summary = finish(run)
    status = StatusFile(run).read()
    if status is not None and status.message:
        sys.stderr.write(status.message + "\n")
    if as_json:
        _print_json(summary)
    else:
        Console().print(scores_table(summary))
    return None


def _score_steps(runs: Sequence[Path], *, as_json: bool) -> None:
    from dataclasses import asdict

    from distill.progress import draw_progress, score_steps

    scored = {}
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        for run in runs:
            _require_run(run)
            scored[run.name] = score_steps(run, _say)
        picture = draw_progress(scored, runs[0] / "progress.png")
        _say(f"wrote {picture}")
    if as_json:
        _print_json({name: [asdict(m) for m in moments] for name, moments in scored.items()})


app.command("export", rich_help_panel="Results")(export)


@app.command(rich_help_panel="Before you train")
def doctor(as_json: JsonOption = False, debug: DebugOption = False) -> None:  # noqa: ARG001  # read by main
    """Check devices, libraries, decoders and disk; say how to fix what fails."""
    from distill.doctor import examine

    findings = examine()
    if as_json:
        _print_json([finding.to_json() for finding in findings])
    else:
        for finding in findings:
            _say(f"{'ok ' if finding.is_ok else 'BAD'}  {finding.what}: {finding.found}")
            if finding.fix:
                _say(f"     Fix: {finding.fix}")
    if not all(finding.is_ok for finding in findings):
        raise typer.Exit(3)


@recipes_app.command("list")
def list_recipes(as_json: JsonOption = False) -> None:
    """Names of the built-in recipes and what each is for."""
    from distill.recipe_file import builtin_recipes

    titles = {
        name: path.read_text().splitlines()[0].removeprefix("# ")
        for name, path in builtin_recipes().items()
    }
    if as_json:
        _print_json(titles)
        return
    for name, title in titles.items():
        _say(f"{name:22} {title}")


@recipes_app.command("show")
def show_recipe(recipe: RecipeArgument) -> None:
    """Print a recipe."""
    from distill.recipe_file import find_recipe

    sys.stdout.write(find_recipe(recipe).read_text())


@recipes_app.command("copy")
def copy_recipe(
    recipe: RecipeArgument, target: Annotated[Path, typer.Argument(metavar="FILE")]
) -> None:
    """Copy a recipe, and the teacher recipe it names, to files of your own."""
    from distill.recipe_file import copy_recipe as copy

    for path in copy(recipe, target):
        _say(f"wrote {path}")
