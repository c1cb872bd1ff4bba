"""The types that travel between the packages, and the legend of dimension names.

Legend (one word, one meaning, everywhere):

    images       images of one batch, or the part of it a rank holds
    crops        crops of one image: 2 global, or ``locals`` local ones
    locals       local crops of one image
    rows         crops * images, or masked patches: whatever a loss averages over
    patches      patch tokens of one crop, row-major over the grid
    masked       masked patches of all global crops, image-major, then crop, then patch
    width        features of a backbone token
    bottleneck   L2-normalised head output, what travels instead of logits
    taught       numbers the teacher sends per token: its head's bottleneck, or its width
    prototypes   rows of a head's last layer

Pixels stay uint8 until they reach the device that uses them; ``normalise`` is the one place that
turns them into floats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor


@dataclass(frozen=True)
class CropBatch:
    """Crops of a contiguous range of positions in the global batch, as decoded."""

    global_crops: UInt8[Tensor, "images 2 3 global_height global_width"]
    local_crops: UInt8[Tensor, "images locals 3 local_height local_width"]
    anchor_crops: UInt8[Tensor, "images 2 3 anchor_height anchor_width"] | None = None


@dataclass(frozen=True)
class Features:
    """What a backbone gives for each crop. ``grid_hw`` is the patch grid (height, width)."""

    class_token: Float[Tensor, "rows width"]
    patch_tokens: Float[Tensor, "rows patches width"]
    grid_hw: tuple[int, int]


@dataclass(frozen=True)
class TeacherTargets:
    """What the teacher says about some images, small enough to send.

    Bottlenecks of its heads; the backbone's features where it has no heads. ``patch_rows`` holds
    masked patches only, ordered like ``masks.nonzero()``.
    ``anchor_patches`` (Gram stage only) is already on the student's grid.
    """

    class_rows: Float[Tensor, "images 2 taught"]
    patch_rows: Float[Tensor, "masked patch_taught"]
    anchor_patches: Float[Tensor, "images 2 patches anchor_width"] | None = None


@dataclass(frozen=True)
class LessonBatch:
    """Everything one student rank needs for its slice of one step.

    ``masks`` lie on the teacher's grid ``grid_hw``; ``start`` is the slice's first position in the
    global batch.
    """

    crops: CropBatch
    masks: Bool[Tensor, "images 2 patches"]
    targets: TeacherTargets
    grid_hw: tuple[int, int]
    start: int
    images_global: int


class Backbone(Protocol):
    """A network that turns pixels into one class feature and a map of patch features."""

    width: int
    stride: int

    def __call__(
        self,
        pixels: Float[Tensor, "rows channels height width"],
        masks: Bool[Tensor, "rows patches"] | None = None,
        *,
        rope_scale: float = 1.0,
        is_local: bool = False,
    ) -> Features:
        """Class token and patch tokens of each crop; masked patches are replaced by the mask token."""
        ...


def normalise(
    crops: UInt8[Tensor, "*rows 3 height width"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Float[Tensor, "*rows 3 height width"]:
    """Crops scaled to [0, 1], shifted by ``mean`` and divided by ``std`` (RGB), computed in fp32."""
    shift = torch.tensor(mean, device=crops.device).view(3, 1, 1) * 255.0
    scale = torch.tensor(std, device=crops.device).view(3, 1, 1) * 255.0
    return ((crops.float() - shift) / scale).to(dtype)
