"""Which images there are: where they lie, their sizes and classes. Built once, a folder of arrays that every rank maps into memory.

    index.json        sources, containers, class names
    names.npy         names, one after another;  name_ends.npy  where each ends
    places.npy        container, offset, length of each image
    hw.npy            height and width;  labels.npy  class, where there are classes

Opening costs the same for a thousand images and for a billion. While it is built every file's
header is read, and for up to 20,000 files every pixel is decoded once, so that a broken file is
named before training; larger sets meet theirs on the way, where they are replaced.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.data.bad_images import MAX_MEGAPIXELS, measure
from distill.data.locations import Kind, Location, Reader
from distill.data.sources import Found, Lister, list_source
from distill.data.stateless_random import mix
from distill.errors import DataError
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
        hw: height and width after EXIF rotation, [images, 2].
        labels: indices into ``class_names``, [images], or None.
        containers: kind and path of each.
        sources: what each source is called, and its number of images; images stand in this order.
    """

    names: NDArray[np.uint8]
    name_ends: NDArray[np.int64]
    locations: NDArray[np.int64]
    hw: NDArray[np.int32]
    labels: NDArray[np.int32] | None
    class_names: tuple[str, ...]
    containers: tuple[tuple[Kind, str], ...]
    sources: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        """Images."""
        return len(self.hw)

    def location(self, image: int) -> Location:
        """Where an image lies."""
        start = int(self.name_ends[image - 1]) if image else 0
        name = self.names[start : int(self.name_ends[image])].tobytes().decode()
        container, offset, length = (int(value) for value in self.locations[image])
        kind, path = self.containers[container]
        return Location(kind, path, name, offset, length)

    @property
    def bounds(self) -> tuple[range, ...]:
        """The images of each source."""
        ends = np.cumsum([0, *(count for _, count in self.sources)]).tolist()
        return tuple(range(start, stop) for start, stop in pairwise(ends))

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
        )


ARRAYS: Mapping[str, type] = {
    "names": np.uint8,
    "name_ends": np.int64,
    "locations": np.int64,
    "hw": np.int32,
    "labels": np.int32,
}


FILES = {"locations": "places.npy"}  # format 1 is older than the name of the field


def _file_of(array: str) -> str:
    return FILES.get(array, f"{array}.npy")


def _map(path: Path, dtype: type) -> NDArray[Any] | None:
    if not path.is_file() and path.stem == "labels":
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
) -> ImageIndex:
    """The images of some sources, source by source, in the order of their names.

    There are classes when every image has a label and there are at least two. A source that was packed
    brings its index, unless ``is_packing``. ``listers`` list their sources. Broken files are named in a warning each and left out.

    Raises:
        DataError: a source is missing or holds no image, or more than ``max_bad_fraction`` of the
        files are broken (one always may be).
    """
    given = listers or {}
    surveys = [_survey(source, given.get(source), reads_index=not is_packing) for source in sources]
    found = [each for survey in surveys for each in survey.found]
    if len(found) > LIST_ENTRIES:
        raise DataError(
            f"data.sources: {len(found):,} images, more than an index of {LIST_ENTRIES:,} holds",
            fix="Train on fewer, or pack them and list the shards of a part.",
        )
    unknown = [each for survey in surveys if survey.sizes is None for each in survey.found]
    measured = iter(_measure_all(unknown, max_megapixels, progress))
    sizes: list[tuple[int, int] | str] = []
    for survey in surveys:
        sizes += islice(measured, len(survey.found)) if survey.sizes is None else survey.sizes
    bad = [
        (each.location, size)
        for each, size in zip(found, sizes, strict=True)
        if isinstance(size, str)
    ]
    for location, reason in bad:
        logger.warning("%s: left out, cannot be used (%s)", location, reason)
    if len(bad) > max(1.0, max_bad_fraction * len(found)) or len(bad) == len(found):
        raise DataError(
            f"{bad[0][0]}: cannot be used ({bad[0][1]}); {len(bad)} of {len(found)} images are broken, "
            f"more than data.max_bad_fraction = {max_bad_fraction:g} allows",
            fix="Repair or remove them, or raise data.max_bad_fraction.",
        )
    usable = [not isinstance(size, str) for size in sizes]
    ends = np.cumsum([0, *(len(survey.found) for survey in surveys)]).tolist()
    counts = [sum(usable[start:stop]) for start, stop in pairwise(ends)]
    good = [each for each, is_good in zip(found, usable, strict=True) if is_good]
    named = tuple((str(source), count) for source, count in zip(sources, counts, strict=True))
    return make_index(good, [size for size in sizes if not isinstance(size, str)], named)


@dataclass(frozen=True)
class _Survey:
    """Images of a source, and their sizes where they are known."""

    found: list[Found]
    sizes: list[tuple[int, int]] | None


def _survey(source: Path, lister: Lister | None, *, reads_index: bool) -> _Survey:
    if lister is not None or not reads_index or not (source / INDEX_FOLDER).is_dir():
        return _Survey(list_source(source, lister), None)
    index = ImageIndex.load(source / INDEX_FOLDER)
    names = index.class_names
    labels = [""] * len(index) if index.labels is None else [names[i] for i in index.labels]
    found = [Found(index.location(image), label) for image, label in enumerate(labels)]
    return _Survey(found, [(height, width) for height, width in index.hw.tolist()])


def make_index(
    found: Sequence[Found],
    sizes: Sequence[tuple[int, int]],
    sources: tuple[tuple[str, int], ...],
) -> ImageIndex:
    """The index of images whose heights and widths are known."""
    containers: dict[tuple[Kind, str], int] = {}
    locations = np.empty((len(found), 3), np.int64)
    names = [each.location.name.encode() for each in found]
    for row, each in enumerate(found):
        location = each.location
        container = containers.setdefault((location.kind, location.container), len(containers))
        locations[row] = container, location.offset, location.length
    labels, class_names = _classes([each.label for each in found])
    return ImageIndex(
        names=np.frombuffer(b"".join(names), np.uint8),
        name_ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        locations=locations,
        hw=np.array(sizes, np.int32).reshape(-1, 2),
        labels=labels,
        class_names=class_names,
        containers=tuple(containers),
        sources=sources,
    )


def _measure_all(
    found: Sequence[Found],
    max_megapixels: float,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[int, int] | str]:
    """Height and width of each image, or what is wrong with it."""
    reader, is_full = Reader(), len(found) <= FULL_CHECK_FILES
    sizes: list[tuple[int, int] | str] = []
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        for size in pool.map(lambda e: measure(reader, e.location, max_megapixels, is_full), found):
            sizes.append(size)
            if progress is not None:
                progress(len(sizes), len(found))
    return sizes


def _classes(labels: Sequence[str]) -> tuple[NDArray[np.int32] | None, tuple[str, ...]]:
    """Class numbers and names, when all are labelled and there are two classes at least; numbers in numeric order."""
    names = sorted(
        set(labels), key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else 0, n)
    )
    if len(names) < 2 or "" in names:
        return None, ()
    order = {name: index for index, name in enumerate(names)}
    return np.array([order[label] for label in labels], np.int32), tuple(names)


def split(index: ImageIndex, fraction: float) -> tuple[ImageIndex, ImageIndex]:
    """Images to train on and a held-out ``fraction`` of each class, chosen by a hash of their order; always the same.

    Raises:
        DataError: a class has a single image, so nothing of it could be held out.
    """
    assert index.labels is not None, "only labelled images are split"
    is_held_out = np.zeros(len(index), bool)
    for label, name in enumerate(index.class_names):
        members = np.flatnonzero(index.labels == label)
        if len(members) < 2:
            raise DataError(
                f"data.sources: class {name!r} has one image, so none can be held out",
                fix="Give each class folder two images or more, or put all images into one folder without classes.",
            )
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        order = np.argsort(mix(np.arange(len(members))), kind="stable")
        is_held_out[members[order[:count]]] = True
    return index.subset(np.flatnonzero(~is_held_out)), index.subset(np.flatnonzero(is_held_out))
