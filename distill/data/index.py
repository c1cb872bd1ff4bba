"""Which images there are: paths, sizes, classes. Built once, saved as one ``.npz``, read by every rank.

Every file's header is read, and for up to 20,000 files every pixel is decoded once, so that a
broken file is named before training and not in the middle of it.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from distill.data.counter import mix
from distill.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
FULL_CHECK_FILES = 20_000
EXIF_ORIENTATION = 0x0112
ROTATED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap height and width
CHECK_THREADS = 4
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageIndex:
    """Images of a data set; ``hw`` is [images, 2] after EXIF rotation, ``labels`` are indices into ``class_names`` or None."""

    paths: tuple[str, ...]
    hw: NDArray[np.int32]
    labels: NDArray[np.int32] | None
    class_names: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over file names within the set, sizes and classes; the same data elsewhere has the same."""
        digest = hashlib.sha256(self.hw.tobytes())
        for path in self.paths:
            digest.update("/".join(Path(path).parts[-2:]).encode())
        return digest.hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Writes one file without pickle, in one rename."""
        aside = path.with_name(f".{path.name}.part")
        arrays: dict[str, NDArray[Any]] = {
            "paths": np.frombuffer("\0".join(self.paths).encode(), np.uint8),
            "class_names": np.frombuffer("\0".join(self.class_names).encode(), np.uint8),
            "hw": self.hw,
            "labels": np.empty(0, np.int32) if self.labels is None else self.labels,
        }
        with aside.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        aside.rename(path)

    @classmethod
    def load(cls, path: Path) -> "ImageIndex":
        """Reads what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays["class_names"].tobytes().decode()
            labels = arrays["labels"]
            return cls(
                paths=tuple(arrays["paths"].tobytes().decode().split("\0")),
                hw=arrays["hw"],
                labels=labels if len(labels) else None,
                class_names=tuple(names.split("\0")) if names else (),
            )


def build_index(
    sources: Sequence[Path],
    *,
    max_bad_fraction: float,
    progress: Callable[[int, int], None] | None = None,
) -> ImageIndex:
    """The images below some folders, in the order of their relative paths.

    The class of an image is the first folder of its path below the source, when every image has one
    and there are at least two. Broken files are named in a warning each and left out.

    Raises:
        DataError: a folder is missing or holds no image, or more than ``max_bad_fraction`` of the
        files are broken (one always may be).
    """
    folders = [source.absolute() for source in sources]
    files = [(source, path) for source in folders for path in list_images(source)]
    is_full_check = len(files) <= FULL_CHECK_FILES
    sizes: list[tuple[int, int] | str] = []
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        for size in pool.map(lambda item: _measure(item[1], is_full_check), files):
            sizes.append(size)
            if progress is not None:
                progress(len(sizes), len(files))
    bad = [
        (path, size) for (_, path), size in zip(files, sizes, strict=True) if isinstance(size, str)
    ]
    for path, reason in bad:
        logger.warning("%s: left out, cannot be decoded (%s)", path, reason)
    if len(bad) > max(1.0, max_bad_fraction * len(files)) or len(bad) == len(files):
        raise DataError(
            f"{bad[0][0]}: cannot be decoded ({bad[0][1]}); {len(bad)} of {len(files)} images are broken, "
            f"more than data.max_bad_fraction = {max_bad_fraction:g} allows",
            fix="Repair or remove them, or raise data.max_bad_fraction.",
        )
    good = [
        (source, path, size)
        for (source, path), size in zip(files, sizes, strict=True)
        if not isinstance(size, str)
    ]
    labels, class_names = _classes([path.relative_to(source) for source, path, _ in good])
    hw = np.array([size for *_, size in good], np.int32).reshape(-1, 2)
    return ImageIndex(tuple(str(path) for _, path, _ in good), hw, labels, class_names)


def list_images(source: Path) -> list[Path]:
    """Absolute paths of the image files below a folder, sorted.

    Raises:
        DataError: it is not a folder, or holds no image.
    """
    if not source.is_dir():
        raise DataError(
            f"data.sources: {source} is not a folder", fix="Give the path of a folder with images."
        )
    found = [
        path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not found:
        raise DataError(
            f"data.sources: {source} holds no images",
            fix=f"Put images ({', '.join(sorted(SUFFIXES))}) into it or its folders.",
        )
    return sorted(path.absolute() for path in found)


def _measure(path: Path, is_full_check: bool) -> tuple[int, int] | str:
    """Height and width, or why the file is broken."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
            if is_full_check:
                image.load()
    except Exception as error:  # Pillow raises whatever its decoders raise
        return str(error).replace(str(path), "").strip() or type(error).__name__
    return (width, height) if orientation in ROTATED else (height, width)


def _classes(relative: Sequence[Path]) -> tuple[NDArray[np.int32] | None, tuple[str, ...]]:
    tops = [path.parts[0] if len(path.parts) > 1 else "" for path in relative]
    names = sorted(set(tops))
    if len(names) < 2 or "" in names:
        return None, ()
    order = {name: index for index, name in enumerate(names)}
    return np.array([order[top] for top in tops], np.int32), tuple(names)


def split(index: ImageIndex, fraction: float) -> tuple[ImageIndex, ImageIndex]:
    """Images to train on and a held-out ``fraction`` of each class, chosen by a hash of their order; always the same.

    Raises:
        DataError: a class has a single image, so nothing of it could be held out.
    """
    assert index.labels is not None, "only labelled images are split"
    is_held_out = np.zeros(len(index.paths), bool)
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
    return _subset(index, ~is_held_out), _subset(index, is_held_out)


def _subset(index: ImageIndex, keep: NDArray[np.bool_]) -> ImageIndex:
    assert index.labels is not None, "only labelled images are split"
    chosen = np.flatnonzero(keep)
    return ImageIndex(
        tuple(index.paths[i] for i in chosen),
        index.hw[chosen],
        index.labels[chosen],
        index.class_names,
    )


def find_undecodable(paths: Sequence[str]) -> tuple[str, str] | None:
    """The first file of a batch that cannot be decoded, with the reason; None when all can."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "truncated images must be errors here"
    for path in paths:
        result = _measure(Path(path), is_full_check=True)
        if isinstance(result, str):
            return path, result
    return None
