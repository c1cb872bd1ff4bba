"""Which images there are: where they lie, their sizes and classes. Built once, a folder of arrays that every rank maps into memory.

    index.json        sources, containers, class names
    names.npy         names, one after another;  name_ends.npy  where each ends
    places.npy        container, offset, length of each image
    hw.npy            height and width;  labels.npy  class, -1 for images without, where there are classes
    held_out.npy      images that their folder (val/, test/) holds out, where there are some
    decoders.npy      who decodes each image, by its header; missing in indexes of version 0.1.0
    file_bytes.npy    bytes of the file each image lies in, in an index that is a source but holds no images itself

Opening costs the same for a thousand images and for a billion; ``distill.data.build_index`` makes one.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import DataError
from distill.listing.headers import Decoder
from distill.listing.labels import number_classes
from distill.listing.locations import Kind, Location
from distill.listing.passed_over import PassedOver
from distill.listing.sources import Found
from distill.runfolder.files import make_folder, replaced

FORMAT = 1


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
        file_bytes: of the file, shard or table that each image lies in, [images]; None where they were not counted.
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
    file_bytes: NDArray[np.int64] | None = None

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
            held_out=None if self.held_out is None else self.held_out[images],
            sources=tuple((s, n) for (s, _), n in zip(self.sources, counts, strict=True)),
            passed_over=self.passed_over,
            decoders=None if self.decoders is None else self.decoders[images],
            file_bytes=None if self.file_bytes is None else self.file_bytes[images],
        )


ARRAYS: Mapping[str, type] = {
    "names": np.uint8,
    "name_ends": np.int64,
    "locations": np.int64,
    "hw": np.int32,
    "labels": np.int32,
    "held_out": np.bool_,
    "decoders": np.uint8,
    "file_bytes": np.int64,
}
OPTIONAL = frozenset({"labels", "held_out", "decoders", "file_bytes"})


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
