"""``distill data embed`` and ``curate``: from a heap of pictures to a balanced part of it."""

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from distill.cli.curation_choices import AmongOption, EmbArgument, OutFolder
from distill.cli.data import SourcesArgument
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
    say,
)
from distill.engine.variables import is_first
from distill.errors import RecipeError

QUICKSTART = Path("runs/quickstart")


def embed(
    sources: SourcesArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder of the embeddings.")],
    network: Annotated[
        Path | None,
        typer.Option(
            "--with",
            metavar="NETWORK",
            help="Exported folder, weights, RUN:NAME; by default the quickstart's teacher.",
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", min=1, help="Side in px; by default the network's.")
    ] = None,
    features: Annotated[
        Literal["class", "class+patch"],
        typer.Option("--features", help="With class+patch the mean of the patches too."),
    ] = "class",
    ranks: RanksOption = 1,
    as_json: JsonOption = False,
    allow: AllowCodeOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Write the features of every image. Run the same command again to go on after a stop."""
    from distill.curation.embed import EmbedRequest, embed_on_rank

    join_launch()
    network = network or _usual_network()
    allow_code_of(network, allow)
    request = EmbedRequest(tuple(sources), network, out, size, features)
    task = partial(embed_on_rank, request, progress)
    facts = on_ranks(task, ranks)
    if not is_first(os.environ):
        return
    if as_json:
        print_json(facts)
        return
    lost = facts["rows"] - facts["usable"]
    left = f", {lost:,} of them cannot be decoded" if lost else ""
    say(f"{facts['rows']:,} images in {out}, {facts['width']} numbers each{left}")
    if facts["embedded_now"]:
        say(f"{facts['embedded_now']:,} images now, {facts['images_per_s']:,.0f} a second")


def _usual_network() -> Path:
    if not (QUICKSTART / "job.json").is_file():
        raise RecipeError(
            "distill data embed: no network is named, and the quickstart was not run here",
            fix="Name one: --with FOLDER, WEIGHTS or RUN:NAME. Or first: distill train quickstart.",
        )
    return Path(f"{QUICKSTART}:teacher")


def curate(
    embeddings: EmbArgument,
    target: Annotated[int, typer.Option("--target", help="Images to choose.")],
    out: OutFolder,
    levels: Annotated[
        str | None,
        typer.Option("--levels", metavar="N,N,...", help="Clusters, from the images up."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    leaves: Annotated[
        Literal["random", "closest"], typer.Option("--leaves", help="What a cluster gives first.")
    ] = "random",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of an image, at most.")] = 1,
    among: AmongOption = None,
    ranks: RanksOption = 1,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Choose a balanced part of embedded images, as a source for training; nothing is copied."""
    from distill.curation.choice import choose_on_rank
    from distill.curation.curate import CurationTarget
    from distill.curation.hierarchy import levels_of

    join_launch()
    wanted = None if levels is None else levels_of(levels)
    choice = CurationTarget(target, wanted, seed, leaves, repeats)
    task = partial(choose_on_rank, embeddings, choice, out, among)
    facts = on_ranks(task, ranks)
    if not is_first(os.environ):
        return
    if as_json:
        print_json(facts)
        return
    counts = " / ".join(f"{count:,}" for count in facts["levels"])
    say(f"{facts['chosen']:,} of {facts['pool']:,} images in {out}, by {counts} clusters")
    say(f"train on them: data.sources=[{out}]")
