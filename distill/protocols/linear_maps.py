"""One linear layer from patch features to a map, on a frozen network, by two protocols.

    quick    ridge regression in closed form, from standardised features of a patch to the mean of its pixels (share
             of every class, or depth); pictures are resized to the network's side. Nothing to choose and no luck of
             a seed, and a network passes each picture once, which two cores can do
    dinov3   batch norm, dropout 0.1, 1x1 convolution, by AdamW on random crops: as published

Both predict at the resolution that the map is stored at: the layer's output is resized (bilinear), the map is not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from distill.listing.limit import in_order
from distill.listing.map_pairs import MapPair
from distill.protocols.images import READERS, resized
from distill.protocols.map_set import MapSet, PatchNetwork

AHEAD = 16  # pictures in memory before they are wanted
SEED = 0
RIDGE = 1e-2  # of the mean squared feature
LEAST_VARIANCE = 1e-12  # of a feature; one that never changes is left at 0
START_RATE = 1e-6
Predict = Callable[[NDArray[np.uint8]], Float[Tensor, "outputs height width"]]
OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class Published:
    """The settings of a published training. ``scales``: of the shorter side, in crops; None for pictures as they are."""

    steps: int
    warmup: int
    rate: float
    decay: float
    betas: tuple[float, float]
    crop_hw: tuple[int, int]
    clip: float = float("inf")
    scales: tuple[float, float] | None = None
    slide: int | None = None
    brightness: tuple[float, float] = (1.0, 1.0)
    degrees: float = 0.0
    batch: int = 16


@runtime_checkable
class MapTarget(Protocol):
    """What the layer learns. ``outputs``: channels of the published layer; ``nothing``: value of a pixel without one."""

    outputs: int
    nothing: int
    published: Published

    def sums(self, values: Tensor, patch: Tensor, patches: int) -> tuple[Tensor, Tensor]:
        """By patch: sums over its pixels of what to predict, [patches, channels], and how many pixels count, both fp64; both inputs flat."""
        ...

    def at_patches(self, outputs: Tensor) -> Tensor:
        """What the published layer means at every patch, before it is resized."""
        ...

    def loss(self, outputs: Tensor, values: Tensor) -> Tensor:
        """Of the published training, a scalar; [crops, channels, height, width] and [crops, height, width]."""
        ...


def samples(
    maps: MapSet, pairs: Sequence[MapPair]
) -> Iterator[tuple[NDArray[np.uint8], NDArray[Any]]]:
    """Picture and map of each pair, a few of them read ahead."""
    for start in range(0, len(pairs), AHEAD):
        part = pairs[start : start + AHEAD]
        yield from in_order(lambda p: (maps.pictures(p.picture), maps.values(p.map)), part, READERS)


def fit_quick(network: PatchNetwork, maps: MapSet, target: MapTarget, on_batch: OnBatch) -> Predict:
    """Ridge regression over all patches of the training pictures, each patch by its share of pixels that count."""
    side = network.preparation.size
    moments, cross, total = torch.zeros(()), torch.zeros(()), 0.0
    for pixels, values in samples(maps, maps.train):
        found = network.patches(resized(pixels, side)[None])[0]
        rows = with_one(found)
        wanted, shares = patch_means(target, torch.from_numpy(values), found.shape[1:])
        weighted = rows * shares[:, None].to(rows)
        moments = weighted.T @ rows + moments.to(rows)
        cross = weighted.T @ wanted.to(rows) + cross.to(rows)
        total += float(shares.sum())
        on_batch(1)
    weights = _standardised(moments.cpu() / max(total, 1.0), cross.cpu() / max(total, 1.0))

    def predict(pixels: NDArray[np.uint8]) -> Float[Tensor, "outputs height width"]:
        found = network.patches(resized(pixels, side)[None])[0]
        outputs = (with_one(found).cpu() @ weights).T.unflatten(1, found.shape[1:])
        return _at(outputs.float()[None], pixels.shape[:2])[0]

    return predict


def with_one(
    found: Float[Tensor, "width rows columns"],
) -> Float64[Tensor, "patches width_and_one"]:
    """A row per patch, and 1 for the constant, in fp64."""
    rows = found.flatten(1).T.double()
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def patch_means(
    target: MapTarget, values: Tensor, grid_hw: Sequence[int]
) -> tuple[Float64[Tensor, "patches channels"], Float64[Tensor, " patches"]]:
    """Mean over the pixels of each patch that count, and their share; a pixel is of the patch that its centre lies in."""
    at = [
        (torch.arange(side) * 2 + 1) * cells // (2 * side)
        for side, cells in zip(values.shape, grid_hw, strict=True)
    ]
    patch, num = (at[0][:, None] * grid_hw[1] + at[1]).flatten(), grid_hw[0] * grid_hw[1]
    sums, counted = target.sums(values.flatten(), patch, num)
    pixels = torch.bincount(patch, minlength=num).clamp_min(1)
    return sums / counted.clamp_min(1)[:, None], counted / pixels


def _standardised(
    moments: Float64[Tensor, "inputs inputs"], cross: Float64[Tensor, "inputs outputs"]
) -> Float64[Tensor, "inputs outputs"]:
    """The ridge solution with every feature at mean 0 and variance 1, for features as they are; the constant is last."""
    mean = moments[-1, :-1]
    spread = (moments.diagonal()[:-1] - mean**2).clamp_min(LEAST_VARIANCE).sqrt()
    change = torch.eye(len(moments), dtype=torch.float64)  # rows of features to standardised ones
    change[:-1, :-1] /= spread
    change[-1, :-1] = -mean / spread
    return change @ solve_ridge(change.T @ moments @ change, change.T @ cross)


def solve_ridge(
    moments: Float64[Tensor, "inputs inputs"], cross: Float64[Tensor, "inputs outputs"]
) -> Float64[Tensor, "inputs outputs"]:
    """Weights of a ridge regression, (X'X + ridge I)^-1 X'Y, from X'X and X'Y."""
    ridge = RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    return torch.linalg.solve(moments + ridge, cross)


def _at(
    outputs: Float[Tensor, "maps channels rows columns"], hw: Sequence[int]
) -> Float[Tensor, "maps channels height width"]:
    return F.interpolate(outputs, size=tuple(hw), mode="bilinear", align_corners=False)


def fit_published(
    network: PatchNetwork, maps: MapSet, target: MapTarget, on_batch: OnBatch
) -> Predict:
    """The head after its training; ``on_batch`` is called with the pictures of every step."""
    how, crop_hw = target.published, crop_of(target.published, network.stride)
    random = np.random.default_rng(SEED)
    torch.manual_seed(SEED)  # of dropout and of the first weights
    width = network.patches(torch.zeros(1, 3, *crop_hw, dtype=torch.uint8)).shape[1]
    layer = nn.Conv2d(width, target.outputs, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.constant_(layer.bias, 0.0)  # type: ignore[arg-type]
    head = nn.Sequential(nn.BatchNorm2d(width), nn.Dropout(0.1), layer)
    head.to(network.device)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=how.rate, betas=how.betas, weight_decay=how.decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_at(how, step) / how.rate
    )
    order: list[int] = []
    for _ in range(how.steps):
        while len(order) < how.batch:
            order += random.permutation(len(maps.train)).tolist()
        chosen, order = [maps.train[index] for index in order[: how.batch]], order[how.batch :]
        crops = [augment(*each, target, crop_hw, random) for each in samples(maps, chosen)]
        pixels, values = (torch.stack(part) for part in zip(*crops, strict=True))
        outputs = _at(target.at_patches(head(network.patches(pixels))), crop_hw)
        optimizer.zero_grad()
        target.loss(outputs, values.to(network.device)).backward()
        nn.utils.clip_grad_norm_(head.parameters(), how.clip)
        optimizer.step()
        schedule.step()
        on_batch(how.batch)
    head.eval()

    def outputs_of(images: Tensor) -> Tensor:
        return target.at_patches(head(network.patches(images)))

    return lambda pixels: _predict(outputs_of, pixels, how, crop_hw, network.stride)


def rate_at(how: Published, step: int) -> float:
    """From ``START_RATE`` up to the rate, then down to 0 by a half cosine."""
    if step < how.warmup:
        return START_RATE + (how.rate - START_RATE) * step / how.warmup
    done = (step - how.warmup) / max(1, how.steps - how.warmup)
    return how.rate * (0.5 + 0.5 * float(np.cos(np.pi * done)))


def crop_of(how: Published, stride: int) -> tuple[int, int]:
    """The published crop, rounded down to full patches."""
    height, width = (max(stride, side // stride * stride) for side in how.crop_hw)
    return height, width


def augment(
    pixels: NDArray[np.uint8],
    values: NDArray[Any],
    target: MapTarget,
    crop_hw: tuple[int, int],
    random: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """A random crop of a picture and its map, uint8 and fp32; beyond the picture it is grey, and no pixel counts."""
    how = target.published
    picture, plane = Image.fromarray(pixels), Image.fromarray(values.astype(np.float32))
    if how.scales is not None:
        factor = crop_hw[0] / min(picture.size) * random.uniform(*how.scales)
        size = tuple(max(1, round(factor * side)) for side in picture.size)
        picture = picture.resize(size, Image.Resampling.BILINEAR)  # type: ignore[arg-type]
        plane = plane.resize(size, Image.Resampling.NEAREST)  # type: ignore[arg-type]
    if how.degrees:
        angle = random.uniform(-how.degrees, how.degrees)
        picture = picture.rotate(angle, Image.Resampling.BILINEAR)
        plane = plane.rotate(angle, Image.Resampling.NEAREST, fillcolor=target.nothing)
    left, top = (
        int(random.integers(0, max(side - crop, 0) + 1))
        for side, crop in zip(picture.size, crop_hw[::-1], strict=True)
    )
    window = np.s_[top : top + crop_hw[0], left : left + crop_hw[1]]
    crop = np.full((*crop_hw, 3), 128, np.uint8)
    wanted = np.full(crop_hw, target.nothing, np.float32)
    inside = np.asarray(picture)[window]
    bright = random.uniform(*how.brightness) * inside.astype(np.float32)
    crop[: inside.shape[0], : inside.shape[1]] = bright.round().clip(0, 255)
    wanted[: inside.shape[0], : inside.shape[1]] = np.asarray(plane)[window]
    if random.random() < 0.5:
        crop, wanted = crop[:, ::-1], wanted[:, ::-1]
    return torch.from_numpy(crop.copy()).permute(2, 0, 1), torch.from_numpy(wanted.copy())


@torch.no_grad()
def _predict(
    outputs_of: Callable[[Tensor], Tensor],
    pixels: NDArray[np.uint8],
    how: Published,
    crop_hw: tuple[int, int],
    stride: int,
) -> Float[Tensor, "outputs height width"]:
    """Windows of the crop's size averaged, or the picture and its mirror image averaged where nothing slides."""
    height, width = pixels.shape[:2]
    if how.slide is None:
        images = resized(
            pixels, *(max(stride, side // stride * stride) for side in (height, width))
        )
        outputs = outputs_of(images[None]) + outputs_of(images[None].flip(3)).flip(3)
        return _at(outputs / 2, (height, width))[0].cpu()
    factor = max(crop_hw) / min(height, width)
    image = resized(pixels, *(max(round(factor * side), max(crop_hw)) for side in (height, width)))
    corners = [
        sorted({*range(0, side - crop, how.slide), side - crop})
        for side, crop in zip(image.shape[1:], crop_hw, strict=True)
    ]
    total = torch.zeros(())
    for top in corners[0]:
        for left in corners[1]:
            window = image[None, :, top : top + crop_hw[0], left : left + crop_hw[1]]
            outputs = _at(outputs_of(window), crop_hw)
            space = (
                left,
                image.shape[2] - left - crop_hw[1],
                top,
                image.shape[1] - top - crop_hw[0],
            )
            ones = torch.cat([outputs, torch.ones_like(outputs[:, :1])], dim=1)
            total = total.to(ones) + F.pad(ones, space)
    return _at(total[:, :-1] / total[:, -1:], (height, width))[0].cpu()
