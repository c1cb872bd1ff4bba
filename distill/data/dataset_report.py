"""What is in some sources: counts, formats, sizes, classes, exact duplicates, and every file that cannot be used.

Every pixel is decoded, by threads: what passes here is decodable in training.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distill.data.bad_images import examine, name_format
from distill.data.build_index import list_images
from distill.listing.decode import Picture, UndecodableError, decode_picture
from distill.listing.labels import label_lines
from distill.listing.locations import Reader
from distill.listing.passed_over import PassedOver
from distill.listing.sources import Found

REMARKS = {
    "transparent": "clear pixels lie on data.background",
    "nearly one colour": "spread below 2 of 255 levels in every channel",
    "very small": "shorter side below 32 px",
    "very dark": "mean below 16 of 255, as 12 bits of a camera in a 16-bit file are",
}
FLAT_SPREAD, SMALL_PX, DARK_LEVEL = 2.0, 32, 16.0
SAMPLED_PIXELS = 100_000  # of an image, evenly spaced
BACKGROUND = (124, 116, 104)  # the default of data.mean


@dataclass(frozen=True)
class BrokenFile:
    """An image that cannot be used, and why."""

    sample: str
    reason: str


@dataclass(frozen=True)
class Remarkable:
    """Images that can be used but are perhaps not what was meant: how many, and the first of them."""

    count: int
    example: str


@dataclass(frozen=True)
class DatasetReport:
    """One source. Sizes are quantiles in pixels; ``duplicates`` counts images whose bytes were found before, in any source.

    ``remarkable`` has the keys of ``REMARKS`` that some image earns.
    """

    source: str
    images: int
    bytes: int
    formats: dict[str, int]
    classes: int
    shorter_side: dict[str, int]
    longer_side: dict[str, int]
    duplicates: int
    broken: tuple[BrokenFile, ...]
    without_label: int  # where others have one
    besides: PassedOver
    remarkable: dict[str, Remarkable]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        fields = asdict(self)
        del fields["besides"]
        return {**fields, **self.besides.to_json()}


@dataclass(frozen=True)
class _Image:
    hw: tuple[int, int] | str
    format: str
    length: int
    digest: bytes
    remarks: tuple[str, ...] = ()


def take_report(
    sources: Sequence[Path],
    *,
    max_megapixels: float,
    progress: Callable[[int, int], None],
) -> list[DatasetReport]:
    """Counts per source; ``progress`` gets images done and images in all.

    Raises:
        DataError: a source is missing or holds no image.
    """
    besides = [PassedOver() for _ in sources]
    listed = [
        list_images(source, passed_over=passed)
        for source, passed in zip(sources, besides, strict=True)
    ]
    total, done = sum(map(len, listed)), 0
    look = partial(_look, Reader(), max_megapixels)
    digests: set[bytes] = set()
    result = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for source, found, passed in zip(sources, listed, besides, strict=True):
            images = []
            for image in pool.map(look, found):
                images.append(image)
                done += 1
                progress(done, total)
            result.append(_count(str(source), found, images, digests, passed))
    return result


def _look(reader: Reader, max_megapixels: float, found: Found) -> _Image:
    try:
        encoded = reader.read(found.location)
    except OSError as error:
        return _Image(error.strerror or str(error), "", 0, b"")
    header = examine(encoded, max_megapixels, is_full=False)
    hw, remarks = header if isinstance(header, str) else header.hw, tuple[str, ...]()
    if not isinstance(header, str):
        try:
            remarks = _remarks(decode_picture(encoded, BACKGROUND))
        except UndecodableError as error:
            hw = str(error)
    digest = hashlib.blake2b(encoded.data, digest_size=16).digest()
    return _Image(hw, name_format(encoded), len(encoded), digest, remarks)


def _remarks(picture: Picture) -> tuple[str, ...]:
    """The keys of ``REMARKS`` that hold for an image."""
    flat = picture.rgb.reshape(-1, 3)
    sample = flat[:: max(1, len(flat) // SAMPLED_PIXELS)].astype(np.float32)
    found = {
        "transparent": picture.is_transparent,
        "nearly one colour": bool(sample.std(axis=0).max() < FLAT_SPREAD),
        "very small": min(picture.rgb.shape[:2]) < SMALL_PX,
        "very dark": bool(sample.mean() < DARK_LEVEL),
    }
    return tuple(key for key, holds in found.items() if holds)


def _count(
    source: str,
    found: Sequence[Found],
    images: Sequence[_Image],
    digests: set[bytes],
    besides: PassedOver,
) -> DatasetReport:
    labels = Counter(each.label for each in found)
    besides.remarks.extend(label_lines(labels))
    duplicates = 0
    for image in images:
        duplicates += image.digest in digests
        if image.digest:
            digests.add(image.digest)
    sizes = np.array([image.hw for image in images if not isinstance(image.hw, str)]).reshape(-1, 2)
    return DatasetReport(
        source=source,
        images=len(images),
        bytes=sum(image.length for image in images),
        formats=dict(Counter(image.format for image in images if image.format).most_common()),
        classes=len(labels.keys() - {""}),
        shorter_side=_quantiles(sizes.min(axis=1)) if len(sizes) else {},
        longer_side=_quantiles(sizes.max(axis=1)) if len(sizes) else {},
        duplicates=duplicates,
        broken=tuple(
            BrokenFile(str(each.location), image.hw)
            for each, image in zip(found, images, strict=True)
            if isinstance(image.hw, str)
        ),
        without_label=labels[""] if len(labels) > 1 else 0,
        besides=besides,
        remarkable=_remarkable(found, images),
    )


def _remarkable(found: Sequence[Found], images: Sequence[_Image]) -> dict[str, Remarkable]:
    counts = Counter(remark for image in images for remark in image.remarks)
    first = {
        remark: str(each.location)
        for each, image in reversed(list(zip(found, images, strict=True)))
        for remark in image.remarks
    }
    return {key: Remarkable(counts[key], first[key]) for key in REMARKS if counts[key]}


def _quantiles(values: Any) -> dict[str, int]:
    names = {"min": 0, "5%": 5, "median": 50, "95%": 95, "max": 100}
    return {name: int(np.percentile(values, part)) for name, part in names.items()}
