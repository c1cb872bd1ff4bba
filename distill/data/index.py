"""Which images there are: where they lie, their sizes and classes. Built once, a folder of arrays that every rank maps into memory.

    index.json        sources, containers, class names
    names.npy         names, one after another;  name_ends.npy  where each ends
    places.npy        container, offset, length of each image
    hw.npy            height and width;  labels.npy  class, -1 for images without, where there are classes
    held_out.npy      images that their folder (val/, test/) holds out, where there are some
    decoders.npy      who decodes each image, by its header; missing in indexes of version 0.1.0

Opening costs the same for a thousand images and for a billion. While it is built every file's
header is read, and for up to 20,000 files every pixel is decoded once, so that a broken file is
named before training; larger sets meet theirs on the way, where they are replaced.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.data.bad_images import MAX_MEGAPIXELS, Header, measure
from distill.data.headers import Decoder
from distill.errors import DataError
from distill.listing.labels import number_classes
from distill.listing.locations import Kind, Location, Reader
from distill.listing.passed_over import PassedOver
from distill.listing.sources import Found, Lister, list_source, refuse_added
from distill.runfolder.files import make_folder, replaced

FORMAT = 1
INDEX_FOLDER = "index"  # within a packed source
FULL_CHECK_FILES = 20_000
CHECK_THREADS = 4
LIST_ENTRIES = 10_000_000  # of one index while it is built: their names are held in memory
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageIndex:
    """Images of a data set; arrays may be mapped from disk.

    Args:
        names: UTF-8 bytes of all names.
        name_ends: where each name ends, [images].
        locations: container, offset, length, [images, 3].
        hw: height and width of the upright image, [images, 2].
        labels: indices into ``class_names``, -1 for an image without a class, [images]; None for fewer than two classes.
        containers: kind and path of each.
        sources: what each source is called, and its number of images; images stand in this order.
        held_out: images that their folder holds out, [images]; None where no folder does.
        passed_over: what the sources hold besides.
        decoders: ``Decoder`` of each image, [images]; None where none was decided.
    """

    names: NDArray[np.uint8]
    name_ends: NDArray[np.int64]
    locations: NDArray[np.int64]
    hw: NDArray[np.int32]
    labels: NDArray[np.int32] | None
    class_names: tuple[str, ...]
    containers: tuple[tuple[Kind, str], ...]
    sources: tuple[tuple[str, int], ...]
    held_out: NDArray[np.bool_] | None = None
    passed_over: PassedOver = field(default_factory=PassedOver)
    decoders: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        """Images."""
        return len(self.hw)

    def location(self, image: int) -> Location:
        """Where an image lies."""
        start = int(self.name_ends[image - 1]) if image else 0
        name = (
            self.names[start : int(self.name_ends[image])]
            .tobytes()
            .decode(errors="surrogateescape")
        )
        container, offset, length = (int(value) for value in self.locations[image])
        kind, path = self.containers[container]
        return Location(kind, path, name, offset, length)

    def decoder(self, image: int) -> Decoder:
        """Who decodes an image."""
        return Decoder.UNDECIDED if self.decoders is None else Decoder(int(self.decoders[image]))

    @property
    def bounds(self) -> tuple[range, ...]:
        """The images of each source."""
        ends = np.cumsum([0, *(count for _, count in self.sources)]).tolist()
        return tuple(range(start, stop) for start, stop in pairwise(ends))

    @property
    def label_counts(self) -> Counter[str]:
        """Number of images by the name of their class; of those without under the empty text. Empty for fewer than two classes."""
        if self.labels is None:
            return Counter()
        labels, counts = np.unique(self.labels, return_counts=True)
        names = ("", *self.class_names)
        return Counter({names[i + 1]: n for i, n in zip(labels, counts.tolist(), strict=True)})

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over names within the sources, sizes and classes; the same data elsewhere has the same."""
        digest = hashlib.sha256(np.ascontiguousarray(self.hw).tobytes())
        digest.update(np.ascontiguousarray(self.names).tobytes())
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path, relative_to: Path | None = None) -> None:
        """Writes a folder without pickle; what was there is replaced at once.

        ``relative_to`` is the folder's parent: containers below it are found wherever it is moved.
        """
        facts = {
            "format": FORMAT,
            "class_names": self.class_names,
            "containers": [
                [int(kind), path if relative_to is None else os.path.relpath(path, relative_to)]
                for kind, path in self.containers
            ],
            "sources": self.sources,
            **self.passed_over.to_json(),
        }
        make_folder(folder.parent)
        with replaced(folder) as aside:
            aside.mkdir()
            for name in ARRAYS:
                array = getattr(self, name)
                if array is not None:
                    np.save(aside / _file_of(name), array, allow_pickle=False)
            (aside / "index.json").write_text(json.dumps(facts))

    @classmethod
    def load(cls, folder: Path) -> "ImageIndex":
        """Maps what ``save`` wrote.

        Raises:
            DataError: it is not there, is damaged, or of another format.
        """
        try:
            facts = json.loads((folder / "index.json").read_text())
            if facts["format"] != FORMAT:
                raise ValueError(f"format {facts['format']}, this version reads {FORMAT}")
            arrays: dict[str, Any] = {
                name: _map(folder / _file_of(name), dtype) for name, dtype in ARRAYS.items()
            }
            return cls(
                **arrays,
                class_names=tuple(facts["class_names"]),
                containers=tuple(
                    (
                        Kind(kind),
                        os.path.normpath(folder.absolute().parent / path),
                    )  # absolute ones stay
                    for kind, path in facts["containers"]
                ),
                sources=tuple((name, count) for name, count in facts["sources"]),
                passed_over=PassedOver.from_json(facts),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder}: not a readable index ({error})", fix="Remove it; it is built again."
            ) from error

    def subset(self, images: NDArray[np.int64]) -> "ImageIndex":
        """Some of the images, in the order given, which keeps sources together."""
        starts = np.concatenate([[0], self.name_ends[:-1]])[images]
        parts = [
            self.names[start:end] for start, end in zip(starts, self.name_ends[images], strict=True)
        ]
        counts = [int(((images >= b.start) & (images < b.stop)).sum()) for b in self.bounds]
        return ImageIndex(
            names=np.concatenate(parts or [np.empty(0, np.uint8)]),
            name_ends=np.cumsum([len(part) for part in parts], dtype=np.int64),
            locations=self.locations[images],
            hw=self.hw[images],
            labels=None if self.labels is None else self.labels[images],
            class_names=self.class_names,
            containers=self.containers,
            sources=tuple((s, n) for (s, _), n in zip(self.sources, counts, strict=True)),
            passed_over=self.passed_over,
            decoders=None if self.decoders is None else self.decoders[images],
        )


ARRAYS: Mapping[str, type] = {
    "names": np.uint8,
    "name_ends": np.int64,
    "locations": np.int64,
    "hw": np.int32,
    "labels": np.int32,
    "held_out": np.bool_,
    "decoders": np.uint8,
}
OPTIONAL = frozenset({"labels", "held_out", "decoders"})


FILES = {"locations": "places.npy"}  # format 1 is older than the name of the field


def _file_of(array: str) -> str:
    return FILES.get(array, f"{array}.npy")


def _map(path: Path, dtype: type) -> NDArray[Any] | None:
    if not path.is_file() and path.stem in OPTIONAL:
        return None
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != dtype:
        raise ValueError(f"{path.name} holds {array.dtype}, not {np.dtype(dtype)}")
    return array


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
    headers = _headers_of(sources, surveys, max_megapixels, progress)
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
    """Images of a source, and their sizes where they are known."""

    found: list[Found]
    sizes: list[tuple[int, int]] | None


def _packed_index(source: Path, lister: Lister | None) -> ImageIndex | None:
    """The index that a packed source brings; None where it was not packed.

    Raises:
        DataError: the index is damaged, or images or shards were added beside it.
    """
    folder = source / INDEX_FOLDER
    if lister is not None or not (folder / "index.json").is_file():
        return None
    index = ImageIndex.load(folder)
    refuse_added(source, [path for _, path in index.containers], folder)
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
    return _Survey(found, [(height, width) for height, width in index.hw.tolist()])


def make_index(
    found: Sequence[Found],
    sizes: Sequence[tuple[int, int]],
    sources: tuple[tuple[str, int], ...],
    decoders: Sequence[Decoder] | None = None,
) -> ImageIndex:
    """The index of images whose heights and widths are known, and who decodes them, where it was decided."""
    containers: dict[tuple[Kind, str], int] = {}
    locations = np.empty((len(found), 3), np.int64)
    names = [each.location.name.encode(errors="surrogateescape") for each in found]
    for row, each in enumerate(found):
        location = each.location
        container = containers.setdefault((location.kind, location.container), len(containers))
        locations[row] = container, location.offset, location.length
    labels, class_names = number_classes([each.label for each in found])
    held_out = [each.is_held_out for each in found]
    return ImageIndex(
        names=np.frombuffer(b"".join(names), np.uint8),
        name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        locations=locations,
        hw=np.array(sizes, np.int32).reshape(-1, 2),
        labels=labels,
        class_names=class_names,
        containers=tuple(containers),
        sources=sources,
        held_out=np.array(held_out, np.bool_) if any(held_out) else None,
        decoders=None if decoders is None else np.array(decoders, np.uint8),
    )


def _headers_of(
    sources: Sequence[Path],
    surveys: Sequence[_Survey],
    max_megapixels: float,
    progress: Callable[[int, int], None] | None,
) -> list[Header | str]:
    """The header of each image, or what is wrong with it; read where no packed index holds it."""
    stored = [_stored_headers(*each) for each in zip(sources, surveys, strict=True)]
    pairs = list(zip(stored, surveys, strict=True))
    unknown = [each for headers, survey in pairs if headers is None for each in survey.found]
    measured = iter(_measure_all(unknown, max_megapixels, progress))
    known: list[Header | str] = []
    for headers, survey in pairs:
        known += islice(measured, len(survey.found)) if headers is None else headers
    return known


def _stored_headers(source: Path, survey: _Survey) -> list[Header] | None:
    """The headers that a packed source has in its index; None where who decodes is missing, as in those of version 0.1.0."""
    if survey.sizes is None:
        return None
    decoders = ImageIndex.load(source / INDEX_FOLDER).decoders
    if decoders is None:
        return None
    pairs = zip(survey.sizes, decoders.tolist(), strict=True)
    return [Header(hw, Decoder(decoder)) for hw, decoder in pairs]


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
