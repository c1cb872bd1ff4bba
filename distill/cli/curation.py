"""``distill data embed`` and ``curate``: from a heap of pictures to a balanced part of it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from distill.cli.data import ProgressBar, SourcesArgument
from distill.cli.options import DebugOption, JsonOption, print_json, progress, say
from distill.errors import RecipeError


def embed(
    sources: SourcesArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder of the embeddings.")],
    network: Annotated[
        Path, typer.Option("--with", metavar="NETWORK", help="Exported folder, weights, RUN:NAME.")
    ],
    size: Annotated[
        int | None, typer.Option("--size", min=1, help="Side in px; by default the network's.")
    ] = None,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Write the class feature of every image. Run the same command again to go on after a stop."""
    import torch

    from distill.curation.embeddings import embed as write

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = write(sources, network, out, progress, size=size, device=device)
    lost = found.num_rows - int(found.usable().sum())
    left = f", {lost:,} of them cannot be decoded" if lost else ""
    say(f"{found.num_rows:,} images in {out}, {found.width} numbers each{left}")


def curate(
    embeddings: Annotated[Path, typer.Argument(metavar="EMB", help="Of distill data embed.")],
    target: Annotated[int, typer.Option("--target", help="Images to choose.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder for data.sources.")],
    levels: Annotated[
        str | None,
        typer.Option("--levels", metavar="N,N,...", help="Clusters, from the images up."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    leaves: Annotated[
        Literal["random", "closest"], typer.Option("--leaves", help="What a cluster gives first.")
    ] = "random",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Of an image, at most.")] = 1,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Choose a balanced part of embedded images, as a source for training; nothing is copied."""
    from distill.curation.choice import choose
    from distill.curation.curate import CurationTarget
    from distill.curation.embeddings import StoredEmbeddings

    wanted = None if levels is None else _levels(levels)
    choice = CurationTarget(target, wanted, seed, leaves, repeats)
    with ProgressBar("clusters") as bar:
        facts = choose(StoredEmbeddings.open(embeddings), choice, out, bar)
    if as_json:
        print_json(facts)
        return
    counts = " / ".join(f"{count:,}" for count in facts["levels"])
    say(f"{facts['chosen']:,} of {facts['pool']:,} images in {out}, by {counts} clusters")
    say(f"train on them: data.sources=[{out}]")


def _levels(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise RecipeError(
            f"--levels {text}: not numbers above 0", fix="Write --levels 1000,500,250."
        )
    return tuple(int(part) for part in parts)
