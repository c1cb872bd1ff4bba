"""Images and labels to score on, and features of them.

Each file is decoded once for all networks: the pixels at every side that one of them wants stay in memory, up to
``MOST_BYTES`` of a split. Beyond that a file is decoded again for each network.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from PIL import Image
from torch import Tensor, nn

from distill.data.index import ImageIndex
from distill.data.locations import Location, Reader
from distill.data.split import why_nothing_is_held_out
from distill.errors import UserError
from distill.listing.decode import Rgb, decode_rgb, reason_of
from distill.listing.limit import in_order
from distill.weights.stated_inputs import PREPARATION, stated_inputs
from teacher.batch import normalise

BATCH = 64  # images per forward; keeps a ViT-L at 256 px below 4 GiB
MAX_IMAGES = 10_000  # of each split; the pixel baseline holds them in memory
MOST_UNLABELLED = 2000  # evenly spaced
MOST_BYTES = 4 << 30  # of pixels in memory, of each split
REPORT_EVERY_S = 20.0
POINT_SEED = 0
PICTURE_LIMIT_S = (
    60.0  # for which reading one may block, on a pipe or on a mount whose server is gone
)
READERS = 2  # files at a time
BF16_FROM = (
    500_000_000  # parameters; from ViT-H+ on a GPU computes in bf16: a 7B takes 45 minutes in fp32
)
Pixels = Callable[[Location], np.ndarray]
Precision = Literal["auto", "fp32", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """Images with the labels a score needs, in the order of the index."""

    locations: Sequence[Location]
    labels: Int64[Tensor, " images"]


@dataclass(frozen=True)
class LeftOut:
    """An image that is not scored, and why."""

    sample: str
    reason: str


@dataclass(frozen=True)
class ReadSplit:
    """A split's images that can be decoded, their pixels in the same order, and those that were left out.

    ``others``: their pixels at further sides.
    """

    split: Scored
    pixels: UInt8[Tensor, "images 3 size size"]
    left_out: tuple[LeftOut, ...]
    others: Mapping[int, UInt8[Tensor, "images 3 other_size other_size"]] = field(
        default_factory=dict
    )

    def batches(
        self, preparation: "Preparation", batch: int = BATCH, *, owned: tuple[int, int] = (0, 1)
    ) -> Iterator[UInt8[Tensor, "batch 3 side side"]]:
        """The images as a network wants them, from memory where they are there; ``owned``: batch ``i``, ``i + n``, ... alone."""
        by_side = {self.pixels.shape[-1]: self.pixels, **self.others}
        first, every = owned
        if preparation.size in by_side:
            yield from by_side[preparation.size].split(batch)[first::every]
        else:
            locations = self.split.locations
            for start in range(first * batch, len(locations), every * batch):
                yield from decode_images(locations[start : start + batch], preparation, batch)


@dataclass(frozen=True)
class Preparation:
    """How a network wants its images: side in pixels, RGB mean and std of images in [0, 1], and what clear pixels are laid on (None: as stored)."""

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    background: Rgb | None = None


@dataclass(frozen=True)
class Extracted:
    """Features of some images, fp32 on the CPU: class token, mean of the patches, and the patch under one point of each.

    The points are the same for all networks, whatever their grids.
    """

    class_token: Float[Tensor, "images width"]
    mean_patch: Float[Tensor, "images width"]
    patch: Float[Tensor, "images width"]


def extract(
    backbone: nn.Module,
    locations: Sequence[Location],
    preparation: Preparation,
    *,
    device: torch.device,
    batch: int = BATCH,
) -> Float[Tensor, "images width"]:
    """Class token of each image, as ``extract_all``, of files in the order of ``locations``."""
    batches = decode_images(locations, preparation, batch)
    return extract_all(backbone, batches, preparation, device=device).class_token


@torch.inference_mode()
def extract_all(
    backbone: nn.Module,
    batches: Iterable[UInt8[Tensor, "batch 3 size size"]],
    preparation: Preparation,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] = lambda _: None,
    points: Float64[Tensor, "images 2"] | None = None,
) -> Extracted:
    """Features of images in the order in which they come.

    The backbone satisfies ``Backbone``, is in evaluation mode, fp32 and already on ``device``. ``dtype``: of
    its matrix products; sums over blocks stay in fp32. ``on_batch`` is called with the number of images of every batch.
    ``points``: of each image, in [0, 1); without, the first ones of a fixed seed.
    """
    parts: list[tuple[Tensor, ...]] = []
    generator = torch.Generator().manual_seed(POINT_SEED)
    done = 0
    for images in batches:
        pixels = normalise(
            images.to(device), preparation.mean, preparation.std, dtype=torch.float32
        )
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found = backbone(pixels)
        if points is None:
            under_points = torch.rand(len(images), 2, generator=generator, dtype=torch.float64)
        else:
            under_points = points[done : done + len(images)]
        done += len(images)
        rows, columns = (under_points * torch.tensor(found.grid_hw)).long().unbind(1)
        under = (rows * found.grid_hw[1] + columns).to(device)
        patches = found.patch_tokens
        each = torch.arange(len(images), device=device)
        features = found.class_token, patches.float().mean(1), patches[each, under]
        parts.append(tuple(feature.float().cpu() for feature in features))
        on_batch(len(images))
    return Extracted(*(torch.cat(part) for part in zip(*parts, strict=True)))


def scoring_dtype(
    parameters: int, device: torch.device, precision: Precision = "auto"
) -> torch.dtype:
    """Returns what a network's matrix products are computed in; ``auto`` is bf16 for a large one on a GPU, else fp32."""
    is_large = device.type == "cuda" and parameters >= BF16_FROM
    is_bf16 = is_large if precision == "auto" else precision == "bf16"
    return torch.bfloat16 if is_bf16 else torch.float32


def decode(
    reader: Reader, location: Location, size: int, background: Rgb | None
) -> UInt8[Tensor, "3 size size"]:
    """The image upright in RGB at ``size`` x ``size``, resized (bilinear) only when it differs; clear pixels lie on ``background``.

    Raises:
        UserError: the file is missing or is no image.
    """
    try:
        return resized(read_pixels(reader, location, background), size)
    except OSError as error:
        raise UserError(
            f"{location}: cannot be decoded ({error})",
            fix="restore the file, or train again so that the index leaves it out.",
        ) from error


def read_pixels(
    reader: Reader, location: Location, background: Rgb | None
) -> UInt8[np.ndarray, "height width 3"]:
    """The image upright in RGB, as ``decode_rgb``."""
    return decode_rgb(reader.read(location), background)


def resized(
    pixels: UInt8[np.ndarray, "height width 3"], size: int, width: int | None = None
) -> UInt8[Tensor, "3 size new_width"]:
    """A picture of this height and width, bilinear; a square without ``width``."""
    wide = size if width is None else width
    if pixels.shape[:2] != (size, wide):
        image = Image.fromarray(pixels).resize((wide, size), Image.Resampling.BILINEAR)
        pixels = np.asarray(image)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def read_split(
    split: Scored,
    size: int,
    background: Rgb | None,
    others: Iterable[int] = (),
    *,
    limit_s: float = PICTURE_LIMIT_S,
    pictures: Pixels | None = None,
) -> ReadSplit:
    """Decodes a split at ``size`` x ``size`` px; each image that cannot be used is left out and named in a warning.

    ``others``: further sides, which are taken from the same decoded image as far as memory goes. For the index of a
    large set only headers were read, so that damage behind one is met here first.
    ``limit_s``: for which reading an image may block. ``pictures``: where other tasks look for decoded ones.

    Raises:
        UserError: a source is gone.
        StorageError: its storage refuses an image for minutes, or answers for none.
    """
    reader = Reader(limit_s=limit_s)
    sides = sides_in_memory(len(split.locations), size, others)

    def attempt(location: Location) -> list[UInt8[Tensor, "3 side side"]] | LeftOut:
        try:
            pixels = pictures(location) if pictures else read_pixels(reader, location, background)
            return [resized(pixels, side) for side in sides]
        except OSError as error:
            if reader.is_gone(location):
                raise UserError(
                    f"{location.container}: the source is gone, so nothing of it can be scored",
                    fix="bring it back.",
                ) from error
            return LeftOut(str(location), reason_of(error))

    results = list(in_order(attempt, split.locations, READERS))
    left_out = tuple(each for each in results if isinstance(each, LeftOut))
    for each in left_out:
        log.warning("%s: left out of the scores, cannot be used (%s)", each.sample, each.reason)
    good = [i for i, each in enumerate(results) if not isinstance(each, LeftOut)]
    if left_out:
        locations = [split.locations[i] for i in good]
        split = replace(split, locations=locations, labels=split.labels[good])
    stacked = {side: torch.zeros(len(good), 3, side, side, dtype=torch.uint8) for side in sides}
    for row, index in enumerate(good):
        for side, pixels in zip(sides, results[index], strict=True):  # type: ignore[arg-type]
            stacked[side][row] = pixels
        results[index] = []  # its memory is free again
    return ReadSplit(split, stacked.pop(size), left_out, stacked)


def sides_in_memory(num_images: int, size: int, others: Iterable[int]) -> list[int]:
    """``size``, then those of ``others``, the smallest first, whose pixels have room in ``MOST_BYTES`` too."""
    sides = [size]
    for side in sorted({*others} - {size}):
        if 3 * num_images * sum(each**2 for each in (*sides, side)) <= MOST_BYTES:
            sides.append(side)
    return sides


def read_preparation(weights: Path, stride: int, usual: Preparation | None = None) -> Preparation:
    """What the files beside a network's weights ask for; ``usual`` where they state nothing that can be used.

    ``stride``: of the network; a side that is no multiple of it cannot be used.

    Raises:
        UserError: nothing is stated and there is no ``usual``.
    """
    stated = stated_inputs(weights)
    has_side = stated.size is not None and stated.size % stride == 0
    size, mean, std = stated.size if has_side else None, stated.mean, stated.std
    if usual is not None:
        return Preparation(size or usual.size, mean or usual.mean, std or usual.std)
    if size is None or mean is None or std is None:
        raise UserError(
            f"{weights}: its size and normalisation of images are stated nowhere",
            fix=f"put the {PREPARATION} of the network there.",
        )
    return Preparation(size, mean, std)


def count_images(say: Callable[[str], None], what: str, total: int) -> Callable[[int], None]:
    """Adds up counts and reports progress, and the minutes that are left, now and then."""
    done, began_s = 0, time.monotonic()
    last_s = began_s

    def on_batch(count: int) -> None:
        nonlocal done, last_s
        done += count
        now_s = time.monotonic()
        if now_s - last_s > REPORT_EVERY_S:
            last_s = now_s
            rate = done / (now_s - began_s)
            left_min = max(0, total - done) / rate / 60
            say(
                f"{what}: {done:,} of {total:,} images, {rate:,.0f} a second, {left_min:.0f} min left"
            )

    return on_batch


def read_splits(run_folder: Path, k: int, *, part: str = "train") -> tuple[Scored, Scored, str]:
    """Training and held-out images, and why they cannot be scored ('' when they can).

    ``part``: which training images, ``train`` for the family's or ``teacher`` for its teacher's.
    """
    nothing = Scored((), torch.zeros(0, dtype=torch.int64))
    train = _read_index(run_folder / "data" / part)
    if reason := _why_unscored(run_folder):
        return nothing, nothing, reason
    if train.labels is None:  # then nothing was held out either, unless folders hold it out
        return nothing, nothing, why_nothing_is_held_out(train, 1.0)
    return splits_of(train, _read_index(run_folder / "data" / "held_out"), k)


def splits_of(train: ImageIndex, test: ImageIndex, k: int) -> tuple[Scored, Scored, str]:
    """As ``read_splits``, of training images with labels and held-out images."""
    nothing = Scored((), torch.zeros(0, dtype=torch.int64))
    if train.labels is None or test.labels is None:
        return nothing, nothing, "the held-out images have no labels"
    scored = [_scored(each, np.asarray(each.labels)) for each in (train, test)]
    if len(scored[0].locations) < k or not scored[1].locations:
        counts = (
            f"{len(scored[0].locations)} training and {len(scored[1].locations)} held-out images"
        )
        is_part = any(index.label_counts[""] for index in (train, test))
        counts += " with a label" if is_part else ""
        return nothing, nothing, f"{counts} are too few for k-NN with k = {k}"
    return scored[0], scored[1], ""


def read_unlabelled(run_folder: Path) -> tuple[Scored, str]:
    """Images of a run whatever their labels, held-out ones where there are some, and the name of their part."""
    part = "held_out" if (run_folder / "data" / "held_out").exists() else "train"
    return unlabelled(_read_index(run_folder / "data" / part)), part


def unlabelled(index: ImageIndex) -> Scored:
    """At most ``MOST_UNLABELLED`` images, evenly spaced, without labels."""
    chosen = np.linspace(0, len(index) - 1, min(len(index), MOST_UNLABELLED)).round()
    locations = [index.location(image) for image in chosen.astype(np.int64).tolist()]
    return Scored(locations, torch.full((len(locations),), -1))


def _why_unscored(run_folder: Path) -> str:
    """Why nothing was held out; empty where something was, and in runs of before, which do not say."""
    facts = run_folder / "data" / "images.json"
    return str(json.loads(facts.read_text()).get("no_held_out", "")) if facts.is_file() else ""


def _read_index(path: Path) -> ImageIndex:
    if not path.exists():
        raise UserError(
            f"{path}: missing, so it is not known which images were held out",
            fix="give the folder of a run that distill train has started.",
        )
    return ImageIndex.load(path)


def _scored(index: ImageIndex, labels: np.ndarray) -> Scored:
    """At most ``MAX_IMAGES`` images with a label, evenly spaced; they are sorted, so each class stays in."""
    labelled = np.flatnonzero(labels >= 0)
    if len(labelled) < len(index):
        log.info("%d of %d images have no label", len(index) - len(labelled), len(index))
    last, count = len(labelled) - 1, min(len(labelled), MAX_IMAGES)
    chosen = labelled[np.linspace(0, last, count).round().astype(np.int64)]
    if count < len(labelled):
        log.info("k-NN uses %d of %d images, evenly spaced", count, len(labelled))
    return Scored(
        [index.location(image) for image in chosen.tolist()],
        torch.from_numpy(labels[chosen].astype(np.int64)),
    )


def decode_images(
    locations: Sequence[Location], preparation: Preparation, batch: int
) -> Iterator[UInt8[Tensor, "images 3 size size"]]:
    """Batches of decoded images, two files at a time (Pillow decodes without the lock)."""
    reader, size = Reader(limit_s=PICTURE_LIMIT_S), preparation.size
    for start in range(0, len(locations), batch):
        part = locations[start : start + batch]
        images = in_order(
            lambda at: decode(reader, at, size, preparation.background), part, READERS
        )
        yield torch.stack(list(images))
