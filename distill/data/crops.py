"""What happens to an image before the network sees it: crop windows and photometric parameters, computed outside the image library.

All parameters of a sample come from its hash, so the pipeline that executes them needs no generator
with state.

Values: METHOD section 2 (two global and N local crops, colour jitter 0.4/0.4/0.2/0.1 with p 0.8,
grayscale p 0.2, blur p 1.0 / 0.1 / 0.5 (a key) with sigma 0.1-2.0, solarise p 0.2 on the second global
crop, threshold 128).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distill.data.sampler import Interleave
from distill.data.stateless_random import hashes, uniforms

NUM_GLOBAL = 2
ASPECT = (3 / 4, 4 / 3)
WINDOW_TRIES = 10  # as torchvision's RandomResizedCrop; the fallback is a central crop
JITTER_PROBABILITY, GRAY_PROBABILITY = 0.8, 0.2
BRIGHTNESS, CONTRAST, SATURATION, HUE_DEGREES = 0.4, 0.4, 0.2, 36.0
BLUR_PROBABILITIES = (1.0, 0.1, 0.5)  # first global, second global, local
SOLARISE_PROBABILITY = (0.0, 0.2)
DRAWS = 4 * WINDOW_TRIES + 10

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class CropSpec:
    """Sizes (pixels), numbers and area ranges of the crops of one image; ``reduces_anchors``: global crops are made of the anchor crops."""

    global_size: int
    global_scale: tuple[float, float]
    num_local: int
    local_size: int
    local_scale: tuple[float, float]
    anchor_size: int | None
    flip_probability: float
    blur_sigma: tuple[float, float]
    blur: tuple[float, float, float] = BLUR_PROBABILITIES
    contrast_about: Literal["mean", "middle"] = "mean"
    reduces_anchors: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of global crops, of local crops if there are any, of anchor crops if there are any."""
        local = (self.local_size,) if self.num_local else ()
        return (
            self.global_size,
            *local,
            *(() if self.anchor_size is None else (self.anchor_size,)),
        )

    @property
    def num_crops(self) -> int:
        """Global and local crops together, without anchor crops."""
        return NUM_GLOBAL + self.num_local


@dataclass(frozen=True)
class CropSchedule:
    """Which sizes a step's crops have: several in fixed shares, each batch of one. Numbers of crops are the same in all.

    Args:
        specs: the sizes.
        steps: which of them a step has.
    """

    specs: tuple[CropSpec, ...]
    steps: Interleave

    @classmethod
    def of(cls, specs: Sequence[CropSpec], ratios: Sequence[float], seed: int) -> "CropSchedule":
        """Sizes in the proportion of ``ratios``, exact over as few steps as they allow."""
        drawn = Interleave.of("sizes", seed, ratios)
        unit = math.gcd(*drawn.quotas)
        quotas = tuple(quota // unit for quota in drawn.quotas)
        return cls(tuple(specs), replace(drawn, quotas=quotas))

    @classmethod
    def one(cls, spec: CropSpec) -> "CropSchedule":
        """The same sizes at every step."""
        return cls.of([spec], [1.0], seed=0)

    @property
    def graph(self) -> CropSpec:
        """What the decoder's graph is built for: the numbers of crops; sizes come with each batch."""
        return self.specs[0]

    def at(self, step: int) -> CropSpec:
        """The crops of a step."""
        if len(self.specs) == 1:
            return self.specs[0]
        kinds, _ = self.steps.at(np.array([step]))
        return self.specs[int(kinds[0])]


@dataclass(frozen=True)
class CropParameters:
    """Parameters of the crops of some images, [images, crops, ...]."""

    windows: Floats
    """top, left, bottom, right in pixels; left and right swapped for a mirrored crop."""
    photometric: Floats
    """brightness, contrast, saturation, hue in degrees, blur sigma (0: none), solarise (0 or 1)."""


def draw_parameters(
    spec: CropSpec,
    *,
    seed: int,
    step: int,
    positions: NDArray[np.int64],
    sample_ids: NDArray[np.int64],
    hw: NDArray[np.int32],
) -> CropParameters:
    """Parameters of every crop of the images at ``positions``; ``hw`` are the images' heights and widths, [images, 2]."""
    crops = np.arange(spec.num_crops)
    words = hashes("crops", seed, step, positions[:, None], sample_ids[:, None], crops[None])
    draws = uniforms(words, DRAWS)  # [images, crops, draws]
    scales = np.array([spec.global_scale] * NUM_GLOBAL + [spec.local_scale] * spec.num_local)
    windows = _windows(draws[..., : 4 * WINDOW_TRIES], hw, scales)
    rest = draws[..., 4 * WINDOW_TRIES :]
    mirrored = rest[..., 9] < spec.flip_probability
    windows[mirrored] = windows[mirrored][:, [0, 3, 2, 1]]
    return CropParameters(windows.astype(np.float32), _photometric(rest, spec).astype(np.float32))


def _windows(
    draws: NDArray[np.float64], hw: NDArray[np.int32], scales: NDArray[np.float64]
) -> NDArray[np.float64]:
    """RandomResizedCrop: the first of ten windows of random area and aspect that fits, else the largest central one."""
    tries = draws.reshape(*draws.shape[:2], WINDOW_TRIES, 4)
    height, width = (hw[:, side].astype(float)[:, None, None] for side in (0, 1))
    low, high = scales[None, :, None, 0], scales[None, :, None, 1]
    area = height * width * (low + (high - low) * tries[..., 0])
    aspect = np.exp(math.log(ASPECT[0]) + math.log(ASPECT[1] / ASPECT[0]) * tries[..., 1])
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)
    first = fits.argmax(axis=2)[..., None]
    any_fits = fits.any(axis=2)
    pick = [
        np.take_along_axis(a, first, axis=2)[..., 0] for a in (w, h, tries[..., 2], tries[..., 3])
    ]
    w, h, top_u, left_u = pick
    full_h, full_w = (np.broadcast_to(side[..., 0], w.shape) for side in (height, width))
    central_w = np.clip(np.rint(full_h * ASPECT[1]), 1, full_w)
    central_h = np.clip(np.rint(full_w / ASPECT[0]), 1, full_h)
    w, h = np.where(any_fits, w, central_w), np.where(any_fits, h, central_h)
    top = np.where(any_fits, np.floor(top_u * (full_h - h + 1)), (full_h - h) // 2)
    left = np.where(any_fits, np.floor(left_u * (full_w - w + 1)), (full_w - w) // 2)
    return np.stack([top, left, top + h, left + w], axis=-1)


def _photometric(draws: NDArray[np.float64], spec: CropSpec) -> NDArray[np.float64]:
    jitters = draws[..., 0] < JITTER_PROBABILITY
    is_gray = draws[..., 1] < GRAY_PROBABILITY
    spans = (BRIGHTNESS, CONTRAST, SATURATION)
    brightness, contrast, saturation = (
        1.0 + jitters * span * (2.0 * draws[..., 2 + i] - 1.0) for i, span in enumerate(spans)
    )
    hue = jitters * HUE_DEGREES * (2.0 * draws[..., 5] - 1.0)
    *of_globals, of_locals = spec.blur
    blur_probability = np.array([*of_globals, *[of_locals] * spec.num_local])
    low, high = spec.blur_sigma
    sigma = low + (high - low) * draws[..., 7]
    blur = np.where(draws[..., 6] < blur_probability, sigma, 0.0)
    solarise_probability = np.array([*SOLARISE_PROBABILITY, *[0.0] * spec.num_local])
    solarise = draws[..., 8] < solarise_probability
    return np.stack(
        [brightness, contrast, np.where(is_gray, 0.0, saturation), hue, blur, solarise], axis=-1
    )


def source_outputs(
    encoded: list[NDArray[np.uint8]], parameters: CropParameters, spec: CropSpec
) -> tuple[Any, ...]:
    """One batch in the order in which the decoder's graph reads it: images, sizes, windows and colours of each crop."""
    squares = [np.full((len(encoded), 2), size, np.float32) for size in spec.sizes]
    per_crop = [
        np.ascontiguousarray(part[:, crop])
        for part in (parameters.windows, parameters.photometric)
        for crop in range(part.shape[1])
    ]
    return (encoded, *squares, *per_crop)
