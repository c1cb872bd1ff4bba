"""Formats of ``distill export`` that are fitted to or measured on images: with a classifier, with int8."""

from collections.abc import Callable
from pathlib import Path

from distill.errors import RecipeError
from distill.evaluate.heads import fit_head, head_exporters
from distill.evaluate.int8 import int8_exporter
from distill.export.choice import Choice
from distill.export.exporter import Exporter
from distill.listing.extensions import ExtensionKind, find
from distill.protocols.images import Preparation
from distill.protocols.score import PROTOCOLS, Protocol


def require(choice: Choice) -> str:
    """As ``Choice.require``, with the protocol."""
    formats = choice.require()
    if choice.protocol not in PROTOCOLS:
        fix = f"Take one of {', '.join(PROTOCOLS)}."
        raise RecipeError(f"--protocol {choice.protocol}: not known", fix=fix)
    return formats


def exporters(
    choice: Choice,
    run: Path,
    network: tuple[str, Path],
    usual: Preparation,
    say: Callable[[str], None],
) -> list[Exporter]:
    """The formats for one network, of name and weights; ``usual``: how its run gave it images.

    Raises:
        UserError: images cannot be read, or have no labels.
    """
    given = (*network, None)
    if choice.head is not None:
        assert choice.labels is not None, "the choice was looked at"
        protocol: Protocol = "dinov3" if choice.protocol == "dinov3" else "quick"
        fitted = fit_head(choice.head, given, choice.labels, protocol, say)
        return head_exporters(fitted, choice.forms)
    if choice.has_int8:
        return [int8_exporter(run, given, usual, choice.calibrate, say)]
    return [find(ExtensionKind.EXPORTER, str(choice.to), "--to")]
