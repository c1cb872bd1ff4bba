"""A network in training: backbone, two heads and the objective. The online network and every student are one of these.

Each loss is a sum over this rank's images divided by a count of the *global* batch and multiplied
by the number of ranks of the group, so that the gradient mean an engine takes over the group is the
exact global mean, whatever the slice sizes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from teacher.batch import Features, StudentBatch, normalise
from teacher.drop_path import ActiveRows, active_rows
from teacher.gram import gram_sum, resize_grid
from teacher.heads import Head
from teacher.losses import koleo_sum
from teacher.shapes import KOLEO_GROUP, scaled_size
from teacher.sinkhorn import SoftAssignment

NUM_GLOBAL = 2


@dataclass(frozen=True)
class Objective:
    """Weight of each term; zero leaves the term out. ``local`` scales the part of local crops.

    ``cosine`` and ``smooth_l1`` belong to teachers without heads (``students.objective``).
    """

    dino: float
    ibot: float
    koleo: float
    local: float
    gram: float = 0.0
    cosine: float = 0.0
    smooth_l1: float = 0.0


@dataclass(frozen=True)
class TaskOptions:
    """How one network is trained: masked input for the online network, plain input for students.

    ``crop_scale``: it sees crops at this part of their size. ``survival``: probability that a row passes
    through a residual branch, below 1 for ViTs only.
    """

    masks_input: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_scale: float = 1.0
    survival: float = 1.0


@dataclass(frozen=True)
class Assignments:
    """Soft targets of one slice: class tokens [2 * images, crop-major] and masked patches."""

    dino: SoftAssignment
    ibot: SoftAssignment

    def part(self, images: slice, masked: slice) -> "Assignments":
        """Of some images and their masked patches."""
        return Assignments(self.dino.part(images, NUM_GLOBAL), self.ibot.part(masked))


@dataclass(frozen=True)
class StepScalars:
    """Numbers of one step that every rank draws the same: RoPE box scales for the two crop kinds, the objective."""

    objective: Objective
    rope_scale_global: float
    rope_scale_local: float


@dataclass(frozen=True)
class Losses:
    """The loss to differentiate and its parts, detached; the mean over the group's ranks is the global value."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]


class DistillationTask(nn.Module):
    """Backbone, heads and loss of one trained network on one group."""

    def __init__(
        self,
        backbone: nn.Module,
        dino_head: Head,
        ibot_head: Head,
        options: TaskOptions,
        group: dist.ProcessGroup | None,
        group_ranks: int,
        koleo_is_local: bool,
    ) -> None:
        """``koleo_is_local``: no KoLeo group of 16 positions is cut by a slice border, so no gathering is needed; ``gather_koleo`` when the batch changes."""
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head
        self.options = options
        self._group = group
        self._group_ranks = group_ranks
        self._koleo_is_local = koleo_is_local

    def gather_koleo(self, *, is_needed: bool) -> None:
        """From now on KoLeo groups are gathered over the ranks, or not: the batch, and with it the slices, has changed."""
        self._koleo_is_local = not is_needed

    def forward(
        self, batch: StudentBatch, assignments: Assignments, scalars: StepScalars
    ) -> Losses:
        """All loss terms for this rank's slice. Communication: KoLeo only, when a slice border cuts one of its groups."""
        weights = scalars.objective
        num_images = len(batch.masks)
        globals_, locals_ = see_crops(self.backbone, batch, self.options, scalars)
        parts = {"dino": self._dino(globals_, locals_, assignments.dino, weights.local, batch)}
        if weights.ibot:
            parts["ibot"] = self._ibot(globals_, assignments.ibot, batch)
        if weights.koleo:
            tokens = globals_.class_token.unflatten(0, (num_images, NUM_GLOBAL))
            koleo = sum(
                koleo_sum(
                    tokens[:, crop],
                    KOLEO_GROUP,
                    batch.start,
                    batch.images_global,
                    None if self._koleo_is_local else self._group,
                )
                for crop in range(NUM_GLOBAL)
            )
            parts["koleo"] = torch.as_tensor(koleo) / batch.images_global
        if weights.gram:
            assert batch.targets.anchor_patches is not None, "a Gram weight without anchor features"
            anchor = batch.targets.anchor_patches.flatten(0, 1)
            patches = resize_grid(
                globals_.patch_tokens, globals_.grid_hw, batch.grid_hw, "bilinear"
            )
            parts["gram"] = gram_sum(patches, anchor) / (NUM_GLOBAL * batch.images_global)
        return weigh(parts, weights, self._group_ranks)

    def _dino(
        self,
        globals_: Features,
        locals_: Features,
        assignment: SoftAssignment,
        local_weight: float,
        batch: StudentBatch,
    ) -> Float[Tensor, ""]:
        """Mean over pairs: each global crop with the other global crop, each local crop with both."""
        num_images, num_locals = batch.crops.local_crops.shape[:2]
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
            (num_images,), 1.0 / (num_pairs * batch.images_global), dtype=torch.float32
        )
        bottleneck = self.dino_head(tokens)
        return self.dino_head.prototypes(
            bottleneck, assignment, torch.cat([other, both]), image_weights
        )

    def _ibot(
        self, globals_: Features, assignment: SoftAssignment, batch: StudentBatch
    ) -> Float[Tensor, ""]:
        """Mean over a crop's masked patches, then over all global crops of the batch (unmasked ones count as zero)."""
        masked, row_weights = masked_rows(globals_, batch)
        mixture = torch.ones(1, 1, device=masked.device)
        return self.ibot_head.prototypes(
            self.ibot_head(masked)[None], assignment, mixture, row_weights
        )


def see_crops(
    backbone: nn.Module, batch: StudentBatch, options: TaskOptions, scalars: StepScalars
) -> tuple[Features, Features]:
    """What a network in training sees of its slice: features of global and of local crops."""
    dtype = next(backbone.parameters()).dtype
    network: Callable[..., Features] = backbone  # a ``Backbone``; ViTs take ``active_rows`` too
    pixels = [
        _shrunk(
            normalise(
                crops, options.mean, options.std, torch.float32, batch.crops.pixel_stats
            ).flatten(0, 1),
            options,
        ).to(dtype)
        for crops in (batch.crops.global_crops, batch.crops.local_crops)
    ]
    masks = batch.masks.flags.flatten(0, 1) if options.masks_input else None
    depth: list[dict[str, ActiveRows]] = [{}, {}]
    if batch.active_rows is not None:
        crops = batch.active_rows.split(
            [NUM_GLOBAL, batch.active_rows.shape[1] - NUM_GLOBAL], dim=1
        )
        depth = [
            {"active_rows": active_rows(part, options.survival, pixels[0].device)} for part in crops
        ]
    return (
        network(pixels[0], masks, rope_scale=scalars.rope_scale_global, is_local=False, **depth[0]),
        network(pixels[1], None, rope_scale=scalars.rope_scale_local, is_local=True, **depth[1]),
    )


def _shrunk(
    pixels: Float[Tensor, "rows 3 height width"], options: TaskOptions
) -> Float[Tensor, "rows 3 smaller_height smaller_width"]:
    """Crops at the size that the network sees, bilinear with antialias."""
    if options.crop_scale == 1.0 or not len(pixels):
        return pixels
    size = [scaled_size(side, options.crop_scale) for side in pixels.shape[2:]]
    return F.interpolate(pixels, size=size, mode="bilinear", antialias=True)


def masked_rows(
    globals_: Features, batch: StudentBatch
) -> tuple[Float[Tensor, "masked width"], Float[Tensor, " masked"]]:
    """Patch features at the masked places of the teacher's grid, and their weights in the loss.

    A network with another grid has its map resized first. The weights average over the masked
    patches of a crop, then over all global crops of the batch.
    """
    masks = batch.masks.flags.flatten(0, 1)  # [images * 2, patches]
    patches = resize_grid(globals_.patch_tokens, globals_.grid_hw, batch.grid_hw, "bilinear")
    rows = batch.masks.rows()
    num_masked = masks.sum(dim=1)
    per_row = (1.0 / num_masked.clamp(min=1)).repeat_interleave(
        num_masked, output_size=rows.shape[0]
    )
    masked = patches.flatten(0, 1).index_select(0, rows)
    return masked, per_row / (NUM_GLOBAL * batch.images_global)


def weigh(parts: dict[str, Tensor], weights: Objective, group_ranks: int) -> Losses:
    """The weighted sum of the terms, each scaled so that the group's mean is the global value."""
    parts = {name: part * group_ranks for name, part in parts.items()}
    total = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
    return Losses(total, {name: part.detach() for name, part in parts.items()})
