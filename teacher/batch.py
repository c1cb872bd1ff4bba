"""The types that travel between the packages, and the legend of dimension names.

Legend (one word, one meaning, everywhere):

    images       images of one batch, or the part of it a rank holds
    crops        crops of one image: 2 global, or ``locals`` local ones
    locals       local crops of one image
    blocks       transformer blocks of one backbone
    rows         crops * images, or masked patches: whatever a loss averages over
    patches      patch tokens of one crop, row-major over the grid
    masked       masked patches of all global crops, image-major, then crop, then patch
    width        features of a backbone token
    bottleneck   L2-normalised head output, what travels instead of logits
    teacher_dim  numbers the teacher sends per token: its head's bottleneck, or its width
    prototypes   rows of a head's last layer

Pixels stay uint8 until they reach the device that uses them; ``normalise`` is the one place that
turns them into floats.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from torch import Tensor

from teacher.shapes import scaled_size

NUM_GLOBAL = 2
# of the rows that a network in training sees: what normalises over images has to find them
CROPS_PER_IMAGE: ContextVar[int] = ContextVar("crops_per_image", default=1)


def onto(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what that is doing: a GPU copies from page-locked memory only."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def use_device(device: torch.device) -> None:
    """Makes a GPU the calling thread's; nothing on a CPU. Called first by every thread that touches one: a new thread has GPU 0, whatever its process computes on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@dataclass(frozen=True)
class CropBatch:
    """Crops of a contiguous range of positions in the global batch, as decoded.

    ``pixel_stats``: mean and standard deviation of each image's source, RGB in [0, 1]; None where all
    images are normalised alike.
    """

    global_crops: UInt8[Tensor, "images 2 3 global_height global_width"]
    local_crops: UInt8[Tensor, "images locals 3 local_height local_width"]
    anchor_crops: UInt8[Tensor, "images 2 3 anchor_height anchor_width"] | None = None
    pixel_stats: Float32[Tensor, "images 2 3"] | None = None

    def pixels(
        self, mean: Sequence[float], std: Sequence[float], scale: float, *, is_local: bool
    ) -> Float[Tensor, "rows 3 height width"]:
        """Global or local crops as a network wants them, fp32: normalised, at a part of their size; image by image."""
        crops = self.local_crops if is_local else self.global_crops
        pixels = normalise(crops, mean, std, torch.float32, self.pixel_stats).flatten(0, 1)
        return pixels if scale == 1.0 else shrunk(pixels, scale)


@dataclass(frozen=True)
class PatchMasks:
    """Which patches of some images are masked. ``counts``, per image, are known to the host, so that no rank waits for a device to count."""

    flags: Bool[Tensor, "images 2 patches"]
    counts: tuple[int, ...]

    @staticmethod
    def of(flags: Bool[Tensor, "images 2 patches"]) -> "PatchMasks":
        """Masks with their counts read off; waits for the device that holds them."""
        return PatchMasks(flags, tuple(flags.sum(dim=(1, 2)).tolist()))

    @staticmethod
    def all_of(masks: "PatchMasks") -> "PatchMasks":
        """Masks over every patch of as many images."""
        each = masks.flags.shape[1] * masks.flags.shape[2]
        return PatchMasks(torch.ones_like(masks.flags), (each,) * len(masks))

    def __len__(self) -> int:
        """Images."""
        return len(self.counts)

    def to(self, device: torch.device) -> "PatchMasks":
        """The same masks on a device."""
        return PatchMasks(onto(self.flags, device), self.counts)

    def part(self, images: slice) -> "PatchMasks":
        """The masks of some of the images; a view."""
        return PatchMasks(self.flags[images], self.counts[images])

    def rows(self) -> Int64[Tensor, " masked"]:
        """Places of the masked patches among all patches, ascending."""
        return torch.nonzero_static(self.flags.flatten(), size=sum(self.counts)).squeeze(1)

    def masked(self, images: slice) -> slice:
        """Where the rows of some images' masked patches lie among those of all."""
        return slice(sum(self.counts[: images.start]), sum(self.counts[: images.stop]))


@dataclass(frozen=True)
class Features:
    """What a backbone gives for each crop. ``grid_hw`` is the patch grid (height, width)."""

    class_token: Float[Tensor, "rows width"]
    patch_tokens: Float[Tensor, "rows patches width"]
    grid_hw: tuple[int, int]

    def patches_on(self, grid_hw: tuple[int, int]) -> Float[Tensor, "rows target_patches width"]:
        """Resamples the patch tokens to another grid, bilinear; unchanged where the grids agree."""
        return resize_grid(self.patch_tokens, self.grid_hw, grid_hw, "bilinear")


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's features of some images, small enough to send.

    Bottlenecks of its heads; the backbone's features where it has no heads. ``patch_features`` holds
    masked patches only, ordered like ``masks.nonzero()``.
    ``anchor_patches`` (Gram stage only) is already on the student's grid.
    """

    class_features: Float[Tensor, "images 2 teacher_dim"]
    patch_features: Float[Tensor, "masked patch_teacher_dim"]
    anchor_patches: Float[Tensor, "images 2 patches anchor_width"] | None = None


@dataclass(frozen=True)
class StudentBatch:
    """Everything one student rank needs for its slice of one step.

    ``masks`` lie on the teacher's grid ``grid_hw``; ``start`` is the slice's first position in the
    global batch. ``active_rows``, on the host, lists which crops (global ones first) pass through which
    branch of which block; None for all.
    """

    crops: CropBatch
    masks: PatchMasks
    targets: TeacherTargets
    grid_hw: tuple[int, int]
    start: int
    images_global: int
    active_rows: Bool[Tensor, "images crops blocks 2"] | None = None

    def part(self, images: slice) -> "StudentBatch":
        """The batch of some of its images, by their numbers in the slice; views."""
        crops, targets = self.crops, self.targets
        anchor = targets.anchor_patches
        return StudentBatch(
            crops=CropBatch(
                crops.global_crops[images],
                crops.local_crops[images],
                pixel_stats=None if crops.pixel_stats is None else crops.pixel_stats[images],
            ),
            masks=self.masks.part(images),
            targets=TeacherTargets(
                targets.class_features[images],
                targets.patch_features[self.masks.masked(images)],
                None if anchor is None else anchor[images],
            ),
            grid_hw=self.grid_hw,
            start=self.start + images.start,
            images_global=self.images_global,
            active_rows=None if self.active_rows is None else self.active_rows[images],
        )

    def class_pairs(
        self, globals_: Features, locals_: Features, local_weight: float
    ) -> tuple[
        Float[Tensor, "crops images width"],
        Float[Tensor, "crops 2"],
        Float[Tensor, " images"],
    ]:
        """Lists the class tokens of all crops, how much each counts against the targets, and each image's weight.

        The mean over pairs: each global crop with the other global crop, each local crop with both.
        """
        num_images, num_locals = self.crops.local_crops.shape[:2]
        tokens = torch.cat(
            [
                globals_.class_token.unflatten(0, (num_images, NUM_GLOBAL)).transpose(0, 1),
                locals_.class_token.unflatten(0, (num_images, num_locals)).transpose(0, 1),
            ]
        )  # [2 + locals, images, width]
        other = 1.0 - torch.eye(NUM_GLOBAL, device=tokens.device)
        both = torch.full((num_locals, NUM_GLOBAL), local_weight, device=tokens.device)
        num_pairs = NUM_GLOBAL * (NUM_GLOBAL - 1) + NUM_GLOBAL * num_locals
        image_weights = tokens.new_full(
            (num_images,), 1.0 / (num_pairs * self.images_global), dtype=torch.float32
        )
        return tokens, torch.cat([other, both]), image_weights

    def masked_rows(
        self, globals_: Features
    ) -> tuple[Float[Tensor, "masked width"], Float[Tensor, " masked"]]:
        """Picks the patch features at the masked places of the teacher's grid, with their weights in the loss.

        A network with another grid has its map resized first. The weights average over the masked
        patches of a crop, then over all global crops of the batch.
        """
        masks = self.masks.flags.flatten(0, 1)  # [images * 2, patches]
        patches = globals_.patches_on(self.grid_hw)
        rows = self.masks.rows()
        num_masked = masks.sum(dim=1)
        per_row = (1.0 / num_masked.clamp(min=1)).repeat_interleave(
            num_masked, output_size=rows.shape[0]
        )
        masked = patches.flatten(0, 1).index_select(0, rows)
        return masked, per_row / (NUM_GLOBAL * self.images_global)


@dataclass(frozen=True)
class Delivery:
    """Crops and targets of the positions one rank requires, ascending; ``positions`` lists them."""

    crops: CropBatch
    targets: TeacherTargets
    masks: PatchMasks
    positions: tuple[range, ...]


def student_batch(
    delivery: Delivery,
    wanted: range,
    grid_hw: tuple[int, int],
    images_global: int,
) -> StudentBatch:
    """The positions ``wanted`` of a delivery, which one network trains on; views, no copies."""
    before = 0
    for part in delivery.positions:
        if part.start <= wanted.start and wanted.stop <= part.stop:
            break
        before += len(part)
    else:
        raise AssertionError(
            f"positions {wanted.start} to {wanted.stop} were not delivered, only {delivery.positions}"
        )
    first = before + wanted.start - part.start
    full = StudentBatch(
        crops=delivery.crops,
        masks=delivery.masks,
        targets=delivery.targets,
        grid_hw=grid_hw,
        start=wanted.start - first,
        images_global=images_global,
    )
    return full.part(slice(first, first + len(wanted)))


RopeScale = float | tuple[float, ...]
"""What the box of RoPE coordinates is stretched by: one factor for all blocks, or one for each."""


class Backbone(Protocol):
    """A network that turns pixels into one class feature and a map of patch features."""

    width: int
    stride: int

    def __call__(
        self,
        pixels: Float[Tensor, "rows channels height width"],
        masks: Bool[Tensor, "rows patches"] | None = None,
        *,
        rope_scale: RopeScale = 1.0,
        is_local: bool = False,
    ) -> Features:
        """Class token and patch tokens of each crop; masked patches are replaced by the mask token."""
        ...


def normalise(
    crops: UInt8[Tensor, "*rows 3 height width"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    pixel_stats: Float32[Tensor, "images 2 3"] | None = None,
) -> Float[Tensor, "*rows 3 height width"]:
    """Crops scaled to [0, 1], shifted by ``mean`` and divided by ``std`` (RGB), computed in fp32.

    With ``pixel_stats`` by those of each image; the crops are then [images, crops, 3, height, width].
    """
    if pixel_stats is None:
        shift, scale = (_filled(values, crops.device) * 255.0 for values in (mean, std))
    else:
        shift, scale = (pixel_stats * 255.0)[:, :, None, :, None, None].unbind(1)
    return ((crops.float() - shift) / scale).to(dtype)


def _filled(values: Sequence[float], device: torch.device) -> Float32[Tensor, "3 1 1"]:
    """Three numbers on a device, which fills them in itself: to copy them there would be to wait for it."""
    single = torch.float32
    filled = [torch.full((1, 1), value, dtype=single, device=device) for value in values]
    return torch.stack(filled)


def shrunk(
    pixels: Float[Tensor, "rows 3 height width"], scale: float
) -> Float[Tensor, "rows 3 smaller_height smaller_width"]:
    """Resizes crops to the size that a network sees, bilinear with antialias."""
    if not len(pixels):
        return pixels
    size = [scaled_size(side, scale) for side in pixels.shape[2:]]
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True)


def resize_grid(
    patches: Float[Tensor, "rows patches width"],
    grid_hw: tuple[int, int],
    target_hw: tuple[int, int],
    mode: str,
) -> Float[Tensor, "rows target_patches width"]:
    """The patch map resampled to another grid, in fp32, without antialias; unchanged when the grids agree.

    ``mode`` is "bicubic" (Gram anchor, as published) or "bilinear" (a student's coarser map on the
    teacher's grid).
    """
    if grid_hw == target_hw:
        return patches
    image = (
        patches.float().transpose(1, 2).unflatten(2, grid_hw)
    )  # [rows, width, height, width of the grid]
    resized = F.interpolate(image, size=target_hw, mode=mode, align_corners=False, antialias=False)
    return resized.flatten(2).transpose(1, 2).to(patches.dtype)
