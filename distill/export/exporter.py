"""What a format to export to has to say: how files are written, read back and described. One file per format.

``distill export --to NAME`` finds a format by name (``distill.listing.extensions``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from students.shapes import BackboneSpec

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Pixels [images, channels, height, width] to class features [images, width] and patch features [images, patches, width]."""


def _has_all() -> None:
    """Passes: nothing is needed to write this format."""


def _has_no_room(folder: Path, licence: Mapping[str, str]) -> None:
    """Leaves the files as they are."""


@dataclass(frozen=True)
class Measured:
    """What was measured of written files.

    Args:
        title, lines: a section of the card; none without a title.
        record: keys of ``distill.json`` and of ``--json``.
        clause: what is printed beside the verification.
        warnings: lines for the screen and the card.
    """

    title: str = ""
    lines: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    clause: str = ""
    warnings: tuple[str, ...] = ()


def _measures_nothing(folder: Path) -> Measured:  # noqa: ARG001  # as every format's
    """Leaves the verification to be all that is known of the files."""
    return Measured()


@dataclass(frozen=True)
class Exporter:
    """A format.

    Args:
        name: what ``--to`` calls it.
        library: what the card calls the library that the files are for.
        reader: the Python package that reads the files back; None where distill does it.
        reader_part: an attribute of that package that must import, too.
        write: writes the network ``name`` of a folder (second) into another (third) in a dtype.
        read_back: opens the written folder with the reader, given the network's stride.
        usage: lines of Python that load the network, given its name, its shape and the file names; the card
            sets ``folder`` and ``pixels`` before them.
        require: passes where everything is installed that writing needs.
        attach: writes licences into files of the folder that have room for them, given names and texts.
        measure: measures the written folder on images, after the verification.
    """

    name: str
    library: str
    reader: str | None
    write: Callable[[str, Path, Path, torch.dtype], None]
    read_back: Callable[[Path, int], Forward]
    usage: Callable[[str, BackboneSpec, Sequence[str]], list[str]]
    reader_part: str = ""
    require: Callable[[], None] = _has_all
    attach: Callable[[Path, Mapping[str, str]], None] = _has_no_room
    measure: Callable[[Path], Measured] = _measures_nothing
