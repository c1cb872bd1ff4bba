"""``distill data``: look at images before training on them, pack them, see what the networks are shown."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from distill.cli.options import (
    AllowCodeOption,
    DebugOption,
    JsonOption,
    OverridesArgument,
    allow_code,
    require_there,
    say,
)
from distill.screen.console import make_console
from distill.screen.counted import ProgressBar

if TYPE_CHECKING:
    from distill.data.dataset_report import DatasetReport

data_app = typer.Typer(help="Check, pack and look at images.", no_args_is_help=True)
SHOWN_BROKEN = 10  # of a source, on the screen; --json has all

SourcesArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="SRC...",
        callback=require_there,
        help="Folders, .tar shards, .txt lists or .parquet files.",
    ),
]
LimitOption = Annotated[
    float, typer.Option("--max-megapixels", help="Larger images are not decoded.")
]


@data_app.command("check")
def check(
    sources: SourcesArgument,
    max_megapixels: LimitOption = 64.0,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Decode every image once: counts, sizes, formats, duplicates, and each broken file. Exit code 1 when any is broken."""
    from distill.data.dataset_report import take_report

    with ProgressBar("checking") as bar:
        found = take_report(sources, max_megapixels=max_megapixels, progress=bar)
    if as_json:
        sys.stdout.write(json.dumps([each.to_json() for each in found], indent=2) + "\n")
    else:
        for each in found:
            make_console().print(_dataset_table(each))
    if any(each.broken for each in found):
        raise typer.Exit(1)


def _dataset_table(dataset: "DatasetReport") -> Table:
    from distill.data.dataset_report import REMARKS

    table = Table(title=dataset.source, title_justify="left", show_header=False, box=None)
    size = (
        f"{dataset.bytes / 1e9:.2f} GB" if dataset.bytes >= 1e8 else f"{dataset.bytes / 1e6:.1f} MB"
    )
    formats = ", ".join(f"{name} {count:,}" for name, count in dataset.formats.items())
    table.add_row("images", f"{dataset.images:,} ({size})")
    table.add_row("formats", formats or "none")
    table.add_row("classes", f"{dataset.classes:,}" if dataset.classes else "none")
    for name, quantiles in (
        ("shorter side", dataset.shorter_side),
        ("longer side", dataset.longer_side),
    ):
        text = ", ".join(f"{part} {value:,}" for part, value in quantiles.items())
        table.add_row(name, f"{text} px" if text else "-")
    table.add_row("duplicates", f"{dataset.duplicates:,} (the same bytes)")
    table.add_row("passed over", dataset.besides.describe() or "nothing")
    for line in dataset.besides.lines():
        table.add_row("", line)
    for name, remark in dataset.remarkable.items():
        text = f"{remark.count:,} ({REMARKS[name]}), such as {remark.example}"
        table.add_row(name, text)
    table.add_row("broken", f"{len(dataset.broken):,}")
    for fault in dataset.broken[:SHOWN_BROKEN]:
        table.add_row("", f"{fault.sample}: {fault.reason}")
    if len(dataset.broken) > SHOWN_BROKEN:
        table.add_row("", f"and {len(dataset.broken) - SHOWN_BROKEN:,} more; --json names all")
    return table


@data_app.command("pack")
def pack(
    words: Annotated[list[Path], typer.Argument(metavar="SRC... OUT")],
    images_per_shard: Annotated[int, typer.Option("--images-per-shard", min=1)] = 10_000,
    max_megapixels: LimitOption = 64.0,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Copy images into tar shards with an index. Run the same command again to go on after a stop."""
    from distill.data.pack import pack as write
    from distill.listing.passed_over import PassedOver

    if len(words) < 2:
        raise typer.BadParameter("give the sources and then the folder to write")
    *sources, out = words
    passed = PassedOver()
    require_there(sources)
    with ProgressBar("packing") as bar:
        counts = write(
            sources,
            out,
            images_per_shard=images_per_shard,
            max_megapixels=max_megapixels,
            progress=bar,
            passed_over=passed,
        )
    if as_json:
        sys.stdout.write(json.dumps(counts) + "\n")
        return
    left = f"; {counts['left_out']:,} left out, see *.left_out.jsonl" if counts["left_out"] else ""
    text = f"{counts['images']:,} images in {counts['shards']:,} shards in {out}{left}"
    for line in (text, *passed.all_lines()):
        say(line)


@data_app.command("show")
def show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE")],
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="The picture.")] = Path("sheet.png"),
    step: Annotated[int, typer.Option("--step", min=0)] = 0,
    images: Annotated[int, typer.Option("--images", min=1, max=64)] = 6,
    stage: Annotated[
        str | None,
        typer.Option(
            "--stage", help="Steps count from the start of this stage of a teacher recipe."
        ),
    ] = None,
    allow: AllowCodeOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Draw what the networks are shown: images, crops and masks of a step, as training would cut them."""
    from distill.recipe.reader import load_job

    allow_code(allow, recipe)
    loaded, teacher = load_job(recipe, list(overrides or []), check_folders=True)

    from distill.report.step_sheet import render_step

    rendered = render_step(loaded, teacher, step=step, num_images=images, stage=stage, out=out)
    say(f"wrote {rendered}")
