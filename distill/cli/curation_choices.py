"""``distill data dedup``: images without their copies, found by bytes, by pixels and by features."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.data import ProgressBar, SourcesArgument
from distill.cli.options import DebugOption, JsonOption, print_json, say

OutFolder = Annotated[Path, typer.Option("-o", "--out", help="The folder for data.sources.")]


class Bars(ExitStack):
    """One progress bar after the other."""

    def __call__(self, what: str) -> Callable[[int, int], None]:
        self.close()
        return self.enter_context(ProgressBar(what))


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
