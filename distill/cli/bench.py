"""``distill bench``: the throughput of a family's job, and of the image loader; ``distill.cli.bench_step`` has what a step needs of a GPU.

``distill bench RECIPE`` is short for ``distill bench job RECIPE``. Nothing heavy is imported until a verb runs.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from distill.bench.assumed import read_jitter
from distill.cli.bench_step import bench_step
from distill.cli.options import (
    AllowCodeOption,
    CostsOption,
    DebugOption,
    OverridesArgument,
    RecipeArgument,
    allow_code,
    count_ranks,
    print_json,
)
from distill.errors import DataError, RecipeError
from distill.runfolder.files import replace_text
from distill.screen.console import make_console

if TYPE_CHECKING:
    from distill.recipe.keys import FamilyRecipe


class JobByDefault(TyperGroup):
    """Runs ``job`` where the first word names no other command of the group."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["job", *args]
        return super().parse_args(ctx, args)


bench_app = typer.Typer(
    cls=JobByDefault,
    help="Measure throughput: of a family's job (job, the default), of the image loader (loader); or count what a step needs of a GPU (step).",
    no_args_is_help=True,
)
bench_app.command("step")(bench_step)
AgainstOption = Annotated[
    str,
    typer.Option(
        "--against", help="published, separate, saving, flops, several with commas, or none."
    ),
]
SleepOption = Annotated[
    float | None,
    typer.Option("--sleep", min=0.01, help="Networks sleep instead; a planned step lasts this."),
]
SlowOption = Annotated[
    str | None, typer.Option("--slow", help="RANK=FACTOR: with --sleep, a slow rank.")
]
SleepJitterOption = Annotated[
    str | None, typer.Option("--jitter", metavar="N%", help="With --sleep: of a rank's step.")
]
ImageSourceOption = Annotated[
    str, typer.Option("--data", help="synthetic images, or the recipe's: synthetic or recipe.")
]
JsonFileOption = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON object; --json FILE.json writes it there, a picture beside it.",
    ),
]


@bench_app.command("loader")
def bench_loader(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    data: ImageSourceOption = "synthetic",
    images: Annotated[int, typer.Option("--images", min=1, help="Images per block.")] = 256,
    allow: AllowCodeOption = False,
    as_json: JsonFileOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Measure the image loader of a recipe against Pillow: images per CPU-second."""
    allow_code(allow, recipe)
    texts, json_file = _json_file(list(overrides or []), is_wanted=as_json)
    report = loader_report(recipe, texts, uses_recipe=_is_recipe(data), images=images)
    _show(report, [loader_table(report)], json_file, as_json=as_json)


def _is_recipe(data: str) -> bool:
    if data not in ("synthetic", "recipe"):
        raise RecipeError(f"--data {data}: not known", fix="Write synthetic or recipe.")
    return data == "recipe"


@bench_app.command("job")
def bench(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, help="Local processes; by default the recipe's.")
    ] = None,
    against: AgainstOption = "published,separate",
    steps: Annotated[int, typer.Option("--steps", min=10, help="Measured steps per mode.")] = 30,
    warmup: Annotated[int, typer.Option("--warmup", min=1, help="Steps before them.")] = 10,
    sleep: SleepOption = None,
    slow: SlowOption = None,
    jitter: SleepJitterOption = None,
    costs: CostsOption = None,
    data: ImageSourceOption = "synthetic",
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Write a PNG of one step of each mode."),
    ] = None,
    allow: AllowCodeOption = False,
    as_json: JsonFileOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Measure a family's throughput against the published procedure and separate jobs."""
    allow_code(allow, recipe)
    texts, json_file = _json_file(list(overrides or []), is_wanted=as_json)
    family, modes = _family_of(recipe, texts), _modes(against, sleep, costs)
    slow_rank, slow_factor = _slow(slow, sleep)
    spread = _jitter(jitter, sleep)

    from distill.bench.measure import Request, measure
    from distill.bench.report import plot_report, tables

    num_ranks = count_ranks(family.engine.processes, ranks)
    request = Request(
        recipe,
        tuple(texts),
        modes,
        num_ranks,
        steps,
        warmup,
        sleep,
        slow_rank,
        slow_factor,
        costs,
        jitter=spread,
    )
    with tempfile.TemporaryDirectory() as folder:
        if _is_recipe(data):
            from distill.job.prepare import training_index

            training_index(family.data, Path("runs/.photographs")).save(Path(folder) / "index")
            request = replace(request, index=str(Path(folder) / "index"))
        report = measure(request)
    if picture is None and json_file is not None:
        picture = json_file.with_suffix(".png")
    if picture is not None:
        plot_report(report, picture)
    _show(report, tables(report), json_file, as_json=as_json)


def _family_of(recipe: str, texts: list[str]) -> "FamilyRecipe":
    from distill.recipe.keys import FamilyRecipe
    from distill.recipe.reader import load_job

    loaded = load_job(recipe, texts)[0]
    if not isinstance(loaded, FamilyRecipe):
        raise RecipeError(f"{recipe}: not a family recipe", fix="Give one with students.")
    return loaded


def _modes(against: str, sleep: float | None, costs: str | None) -> tuple[str, ...]:
    """What to compare with, from the text of ``--against``."""
    modes = () if against == "none" else tuple(against.split(","))
    if not set(modes) <= {"published", "separate", "saving", "flops"}:
        raise RecipeError(
            f"--against {against}: not known",
            fix="Write published, separate, saving, flops, several with commas, or none.",
        )
    if "flops" in modes and costs is None:
        raise RecipeError(
            "--against flops: without measured costs all plans are by FLOPs",
            fix="Add --costs FILE.json.",
        )
    if "saving" in modes and sleep is not None:
        raise RecipeError(
            "--against saving: a rank that sleeps has no state to save", fix="Leave --sleep away."
        )
    return modes


def _json_file(texts: list[str], *, is_wanted: bool) -> tuple[list[str], Path | None]:
    """The file after ``--json``, which a flag leaves among the overrides, and those without it."""
    files = [text for text in texts if is_wanted and "=" not in text and text.endswith(".json")]
    if len(files) > 1:
        raise RecipeError(f"--json {' '.join(files)}: several files", fix="Name one.")
    return [text for text in texts if text not in files], Path(files[0]) if files else None


def _show(
    report: dict[str, Any], tables: Sequence[Table], json_file: Path | None, *, as_json: bool
) -> None:
    """Figures as JSON, to standard output or to a file; as tables for people, unless JSON is on standard output."""
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(json_file, json.dumps(report, indent=2) + "\n")
    if as_json and json_file is None:
        print_json(report)
        return
    for table in tables:
        make_console().print(table)


def _slow(text: str | None, sleep: float | None) -> tuple[int | None, float]:
    """Rank and factor of ``--slow``."""
    if text is None:
        return None, 1.0
    if sleep is None:
        raise RecipeError("--slow needs --sleep", fix="Add --sleep 0.5.")
    rank, _, factor = text.partition("=")
    try:
        return int(rank), float(factor)
    except ValueError as error:
        raise RecipeError(f"--slow {text}: not RANK=FACTOR", fix="Write --slow 2=1.5.") from error


def _jitter(text: str | None, sleep: float | None) -> float:
    """The part that ``--jitter`` is."""
    if text is None:
        return 0.0
    if sleep is None:
        raise RecipeError("--jitter needs --sleep", fix="Add --sleep 0.5.")
    return read_jitter(text)


def loader_report(
    recipe: str, overrides: list[str], *, uses_recipe: bool, images: int
) -> dict[str, Any]:
    """The figures of ``distill bench loader``; prints progress to standard error.

    Raises:
        DataError: the recipe's images are missing.
    """
    from distill.recipe.reader import load_job

    loaded, _ = load_job(recipe, overrides)

    from distill.bench.loader import measure_loader
    from distill.job.prepare import training_index

    def say(text: str) -> None:
        sys.stderr.write(text + "\n")

    index = training_index(loaded.data, Path("runs/.photographs")) if uses_recipe else None
    if index is not None and not len(index):
        raise DataError("data.sources: no images", fix="Leave --data away for synthetic images.")
    return measure_loader(loaded, images=images, index=index, say=say)


def loader_table(report: dict[str, Any]) -> Table:
    """The figures as a table."""
    threads = report["decoder_threads"]
    title = f"{report['images']}, {report['crops']}, {threads} decoder threads"
    table = Table(title=title, title_justify="left")
    for name in ("", "loader", "Pillow", "ratio", "torchvision's blur", "ratio", "images/s"):
        table.add_column(name, justify="left" if not name else "right")
    for name, case in report["cases"].items():
        cells = [f"{case['loader']['median']:.1f}"]
        for side in ("pillow", "torchvision"):
            ratio = case[f"over_{side}"]
            cells.append(f"{case[side]['median']:.1f}")
            cells.append(f"{ratio['median']:.2f} ({ratio['min']:.2f} - {ratio['max']:.2f})")
        table.add_row(name, *cells, f"{case['loader_wall']['median']:.1f}")
    table.caption = "images per CPU-second; the last column per second of time"
    return table
