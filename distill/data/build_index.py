"""Makes the index of some sources.

Every file's header is read, and for up to 20,000 files every pixel is decoded once, so that a broken
file is named before training; larger sets meet theirs on the way, where they are replaced.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from distill.data.bad_images import MAX_MEGAPIXELS, Header, measure
from distill.data.file_sizes import refuse_changed
from distill.data.index import ImageIndex, make_index
from distill.data.manifest import read_manifest
from distill.errors import DataError
from distill.listing.headers import Decoder
from distill.listing.locations import Reader
from distill.listing.passed_over import PassedOver
from distill.listing.sources import INDEX_FOLDER, Found, Lister, list_source, refuse_added

FULL_CHECK_FILES = 20_000
CHECK_THREADS = 4
LIST_ENTRIES = 10_000_000  # of one index while it is built: their names are held in memory
logger = logging.getLogger(__name__)


def build_index(
    sources: Sequence[Path],
    *,
    max_bad_fraction: float,
    max_megapixels: float = MAX_MEGAPIXELS,
    progress: Callable[[int, int], None] | None = None,
    is_packing: bool = False,
    listers: Mapping[Path, Lister] | None = None,
    label_depths: Mapping[Path, int] | None = None,
) -> ImageIndex:
    """The images of some sources, source by source, in the order of their names.

    There are classes when there are at least two; images without a label stay. A source that was packed
    brings its index, unless ``is_packing``. ``listers`` list their sources, ``label_depths`` say which folder
    names the class. Broken files are named in a warning each and left out.

    Raises:
        DataError: a source is missing or holds no image, or more than ``max_bad_fraction`` of the
        files are broken (one always may be).
    """
    passed_over, given, depths = PassedOver(), listers or {}, label_depths or {}
    surveys = []
    for source in sources:
        packed = None if is_packing else _packed_index(source, given.get(source))
        at = passed_over, given.get(source), depths.get(source)
        surveys.append(_survey(source, packed, *at))
    found = [each for survey in surveys for each in survey.found]
    if len(found) > LIST_ENTRIES:
        raise DataError(
            f"data.sources: {len(found):,} images, more than an index of {LIST_ENTRIES:,} holds",
            fix="Train on fewer, or pack them and list the shards of a part.",
        )
    headers = _headers_of(surveys, max_megapixels, progress)
    bad = _refuse_many_broken(found, headers, max_bad_fraction)
    good, good_headers, counts = [], [], []
    rows = iter(zip(found, headers, strict=True))
    for survey in surveys:
        usable = [
            (e, header)
            for e, header in islice(rows, len(survey.found))
            if not isinstance(header, str)
        ]
        good += [each for each, _ in usable]
        good_headers += [header for _, header in usable]
        counts.append(len(usable))
    gone = sorted({each.label for each in found} - {each.label for each in good})
    passed_over.reasons.update({"broken": bad} if bad else {})
    passed_over.lost_classes.extend(f"{name} (all broken)" for name in gone if name)
    named = (source_name(source, depths.get(source)) for source in sources)
    index = make_index(
        good,
        [header.hw for header in good_headers],
        tuple(zip(named, counts, strict=True)),
        [header.decoder for header in good_headers],
    )
    return replace(index, passed_over=passed_over)


def _refuse_many_broken(
    found: Sequence[Found], headers: Sequence[Header | str], max_bad_fraction: float
) -> int:
    """Names each broken image in a warning; returns how many there are.

    Raises:
        DataError: they are too many.
    """
    bad = [
        (each.location, header)
        for each, header in zip(found, headers, strict=True)
        if isinstance(header, str)
    ]
    for location, reason in bad:
        logger.warning("%s: left out, cannot be used (%s)", location, reason)
    if len(bad) > max(1.0, max_bad_fraction * len(found)) or len(bad) == len(found):
        raise DataError(
            f"{bad[0][0]}: cannot be used ({bad[0][1]}); {len(bad)} of {len(found)} images are broken, "
            f"more than data.max_bad_fraction = {max_bad_fraction:g} allows",
            fix="Repair or remove them, or raise data.max_bad_fraction.",
        )
    return len(bad)


def source_name(source: Path, label_depth: int | None) -> str:
    """What an index calls a source: its path, and what else decides the labels of its images."""
    return str(source) if label_depth is None else f"{source} (label_depth {label_depth})"


@dataclass(frozen=True)
class _Survey:
    """Images of a source, and their headers where a packed index holds them."""

    found: list[Found]
    headers: list[Header] | None


def list_images(
    source: Path,
    lister: Lister | None = None,
    *,
    passed_over: PassedOver,
    label_depth: int | None = None,
) -> list[Found]:
    """Every image of a source: those of the index that it brings, else as ``list_source``.

    Raises:
        DataError: as ``list_source``, or its index is damaged.
    """
    index = _packed_index(source, lister)
    return _survey(source, index, passed_over, lister, label_depth).found


def _packed_index(source: Path, lister: Lister | None) -> ImageIndex | None:
    """The index that a packed source or a manifest brings; None for other sources.

    Raises:
        DataError: the index is damaged, or images or shards were added beside it.
    """
    if lister is not None:
        return None
    folder, index = source / INDEX_FOLDER, None
    if (folder / "index.json").is_file():
        index = ImageIndex.load(folder)
        refuse_added(source, [path for _, path in index.containers], folder)
    elif source.suffix == ".parquet" and source.is_file():
        index = read_manifest(source)
    if index is not None:
        refuse_changed(index, source, "Bring back what it was, or embed and choose again.")
    return index


def _survey(
    source: Path,
    index: ImageIndex | None,
    passed_over: PassedOver,
    lister: Lister | None,
    label_depth: int | None,
) -> _Survey:
    if index is None:
        found = list_source(source, lister, passed_over=passed_over, label_depth=label_depth)
        return _Survey(found, None)
    passed_over.add(index.passed_over)
    names = (*index.class_names, "")
    labels = [""] * len(index) if index.labels is None else [names[i] for i in index.labels]
    held_out = [False] * len(index) if index.held_out is None else index.held_out.tolist()
    found = [
        Found(index.location(image), label, is_held_out)
        for image, (label, is_held_out) in enumerate(zip(labels, held_out, strict=True))
    ]
    return _Survey(found, _stored_headers(index))


def _stored_headers(index: ImageIndex) -> list[Header] | None:
    """The headers in a packed index; None where who decodes is missing, as in those of version 0.1.0."""
    if index.decoders is None:
        return None
    pairs = zip(index.hw.tolist(), index.decoders.tolist(), strict=True)
    return [Header((height, width), Decoder(decoder)) for (height, width), decoder in pairs]


def _headers_of(
    surveys: Sequence[_Survey],
    max_megapixels: float,
    progress: Callable[[int, int], None] | None,
) -> list[Header | str]:
    """The header of each image, or what is wrong with it; read where no packed index holds it."""
    unknown = [each for survey in surveys if survey.headers is None for each in survey.found]
    measured = iter(_measure_all(unknown, max_megapixels, progress))
    known: list[Header | str] = []
    for survey in surveys:
        headers = survey.headers
        known += islice(measured, len(survey.found)) if headers is None else headers
    return known


def _measure_all(
    found: Sequence[Found],
    max_megapixels: float,
    progress: Callable[[int, int], None] | None,
) -> list[Header | str]:
    """The header of each image, or what is wrong with it."""
    reader, is_full = Reader(), len(found) <= FULL_CHECK_FILES
    headers: list[Header | str] = []
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        read = pool.map(lambda e: measure(reader, e.location, max_megapixels, is_full), found)
        for header in read:
            headers.append(header)
            if progress is not None:
                progress(len(headers), len(found))
    return headers
