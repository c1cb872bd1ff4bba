"""``distill data dedup``, ``retrieve`` and ``report``: images without their copies, images like some others, a page about a choice."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.data import SourcesArgument
from distill.cli.options import DebugOption, JsonOption, print_json, progress, say
from distill.screen.counted import Bars, ProgressBar

OutFolder = Annotated[Path, typer.Option("-o", "--out", help="The folder for data.sources.")]
AmongOption = Annotated[
    Path | None,
    typer.Option("--among", metavar="CHOSEN", help="Only of these, as dedup EMB wrote them."),
]
ChosenArgument = Annotated[
    Path, typer.Argument(metavar="CHOSEN", help="Of data dedup, curate or retrieve.")
]
EmbArgument = Annotated[Path, typer.Argument(metavar="EMB", help="Of distill data embed.")]


def dedup(
    sources: SourcesArgument,
    out: OutFolder,
    semantic: Annotated[
        float | None,
        typer.Option("--semantic", metavar="EPS", help="Copies by features: cosine above 1 - EPS."),
    ] = None,
    hamming: Annotated[
        int,
        typer.Option(
            "--hamming", min=0, max=32, help="Bits of 64 in which re-encoded copies differ."
        ),
    ] = 10,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Leave copies out: the same bytes, the same picture re-encoded, with embeddings similar ones too."""
    from distill.curation.deduplicate import deduplicate

    with Bars() as bars:
        facts = deduplicate(sources, out, bars, hamming=hamming, eps=semantic)
    if as_json:
        print_json(facts)
        return
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in facts["dropped"].items())
    say(f"{facts['chosen']:,} of {facts['pool']:,} images in {out}; dropped: {dropped or 'none'}")
    say(f"each dropped one and its twin: {out}/dropped.jsonl")


def retrieve(
    embeddings: EmbArgument,
    seed: Annotated[Path, typer.Option("--seed", metavar="SRC|EMB", help="Pictures to look for.")],
    out: OutFolder,
    per_seed: Annotated[int, typer.Option("--per-seed", min=1, help="Images, at most.")] = 4,
    least: Annotated[
        float, typer.Option("--least", min=-1, max=1, help="Cosine to a seed, at least.")
    ] = -1.0,
    most: Annotated[
        float, typer.Option("--most", help="Cosine above which an image is a copy of a seed.")
    ] = 1.1,
    not_like: Annotated[
        Path | None,
        typer.Option("--not-like", metavar="SRC|EMB", help="Such as an evaluation set."),
    ] = None,
    above: Annotated[
        float, typer.Option("--above", help="Cosine to one of --not-like that leaves out.")
    ] = 0.45,
    among: AmongOption = None,
    clusters: Annotated[
        Path | None,
        typer.Option(
            "--cluster", metavar="CHOSEN", help="By curate: take from the clusters of the seeds."
        ),
    ] = None,
    network: Annotated[
        Path | None, typer.Option("--with", metavar="NETWORK", help="That of EMB, for pictures.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Choose the embedded images nearest to given ones, as a source for training; nothing is copied."""
    from distill.curation.retrieve import Retrieval, Sought
    from distill.curation.retrieve import retrieve as write

    sought = Sought(seed, not_like, network, clusters)
    wanted = Retrieval(per_seed, least, most, above)
    with ProgressBar("comparing") as bar:
        facts = write(embeddings, sought, out, wanted, say=progress, among=among, progress=bar)
    if as_json:
        print_json(facts)
        return
    avoided = f", {facts['avoided']:,} left out by --not-like" if not_like else ""
    say(f"{facts['chosen']:,} of {facts['pool']:,} images in {out}{avoided}")
    say(f"train on them: data.sources=[{out}]")


def report(
    chosen: ChosenArgument,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The page; else report.html in CHOSEN.")
    ] = None,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Write one HTML page of a choice beside a random draw of the same size; it loads nothing and sends nothing."""
    from distill.curation.chosen import PAGE
    from distill.curation.evidence_page import write_evidence

    page = out or chosen / PAGE
    say(f"wrote {page} ({write_evidence(chosen, page) / 1e6:.2f} MB)")


def manifest(
    chosen: ChosenArgument,
    out: Annotated[Path, typer.Option("-o", "--out", help="The .parquet file.")],
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Write a choice as one Parquet file, a row for each image that was looked at; data.sources reads it."""
    from distill.curation.manifest import save_manifest

    say(f"{save_manifest(chosen, out):,} rows in {out}")
