"""A network in training: backbone, two heads and the objective. The online network and every student are one of these.

Each loss is a sum over this rank's images divided by a count of the *global* batch and multiplied
by the number of ranks of the group, so that the gradient mean an engine takes over the group is the
exact global mean, whatever the slice sizes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from teacher.batch import (
    CROPS_PER_IMAGE,
    NUM_GLOBAL,
    Features,
    RopeScale,
    StudentBatch,
)
from teacher.chunks import SoftAssignment
from teacher.drop_path import ActiveRows, active_rows
from teacher.gram import gram_sum
from teacher.heads import Head
from teacher.losses import (
    ExtraTerm,
    KoleoGradient,
    Losses,
    Objective,
    extra_parts,
    koleo_gradient,
    koleo_loss,
    weigh,
)
from teacher.shapes import KOLEO_GROUP


@dataclass(frozen=True)
class TaskOptions:
    """How one network is trained: masked input for the online network, plain input for students.

    ``crop_scale``: it sees crops at this part of their size. ``survival``: probability that a row passes
    through a residual branch, below 1 for ViTs only. ``extra``: terms that are added to its loss.
    ``koleo_group``: images that KoLeo compares with each other, consecutive positions of the global batch.
    """

    masks_input: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_scale: float = 1.0
    survival: float = 1.0
    extra: tuple[ExtraTerm, ...] = ()
    koleo_group: int = KOLEO_GROUP


@dataclass(frozen=True)
class SoftAssignments:
    """Soft targets of one slice: class tokens [2 * images, crop-major] and masked patches."""

    dino: SoftAssignment
    ibot: SoftAssignment

    def part(self, images: slice, masked: slice) -> "SoftAssignments":
        """Of some images and their masked patches."""
        return SoftAssignments(self.dino.part(images, NUM_GLOBAL), self.ibot.part(masked))


@dataclass(frozen=True)
class StepScalars:
    """Numbers of one step that every rank draws the same: RoPE box scales for the two crop kinds, of all blocks or of each, and the objective."""

    objective: Objective
    rope_scale_global: RopeScale
    rope_scale_local: RopeScale


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
        """``koleo_is_local``: no KoLeo group is cut by a slice border, so no gathering is needed; ``gather_koleo`` when the batch changes."""
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

    @torch.no_grad()
    def koleo_before(
        self, batch: StudentBatch, parts: Sequence[slice], scalars: StepScalars
    ) -> KoleoGradient:
        """KoLeo of a slice whose micro-batches cut its groups, from class tokens that are computed once more, part by part. Communication: when a slice border cuts a group."""
        tokens = [
            see_global_crops(self.backbone, batch.part(part), self.options, scalars).class_token
            for part in parts
        ]
        group = None if self._koleo_is_local else self._group
        with torch.enable_grad():
            return koleo_gradient(torch.cat(tokens), batch, self.options.koleo_group, group)

    def forward(
        self,
        batch: StudentBatch,
        assignments: SoftAssignments,
        scalars: StepScalars,
        koleo: KoleoGradient | None = None,
    ) -> Losses:
        """All loss terms for this rank's slice, with the KoLeo that ``koleo_before`` found where it did. Communication: KoLeo only, when a slice border cuts one of its groups."""
        weights = scalars.objective
        globals_, locals_ = see_crops(self.backbone, batch, self.options, scalars)
        tokens, mixture, image_weights = batch.class_pairs(globals_, locals_, weights.local)
        masked = batch.masked_rows(globals_) if weights.ibot else None
        of_class = self.dino_head(tokens)
        of_patches = None if masked is None else self.ibot_head(masked[0][None])
        compare = self.dino_head.prototypes
        parts = {"dino": compare(of_class, assignments.dino, mixture, image_weights)}
        if masked is not None:
            alone, compare = mixture.new_ones(1, 1), self.ibot_head.prototypes
            parts["ibot"] = compare(of_patches, assignments.ibot, alone, masked[1])
        if koleo is not None:
            parts["koleo"] = koleo.loss(globals_)
        elif weights.koleo:
            group = None if self._koleo_is_local else self._group
            parts["koleo"] = koleo_loss(globals_, batch, self.options.koleo_group, group)
        if weights.gram:
            assert batch.targets.anchor_patches is not None, "a Gram weight without anchor features"
            anchor = batch.targets.anchor_patches.flatten(0, 1)
            patches = globals_.patches_on(batch.grid_hw)
            parts["gram"] = gram_sum(patches, anchor) / (NUM_GLOBAL * batch.images_global)
        extra = self.options.extra
        parts |= extra_parts(extra, globals_, locals_, batch)
        return weigh(parts, weights, extra, self._group_ranks)


def see_crops(
    backbone: nn.Module, batch: StudentBatch, options: TaskOptions, scalars: StepScalars
) -> tuple[Features, Features]:
    """What a network in training sees of its slice: features of global and of local crops."""
    wanted = options.mean, options.std, options.crop_scale
    pixels = batch.crops.pixels(*wanted, is_local=False)
    local_pixels = batch.crops.pixels(*wanted, is_local=True)
    globals_ = _see_global(backbone, pixels, batch, options, scalars)
    depth = None if batch.active_rows is None else batch.active_rows[:, NUM_GLOBAL:]
    before = CROPS_PER_IMAGE.set(batch.crops.local_crops.shape[1])
    locals_ = _see(
        backbone, local_pixels, depth, options, None, scalars.rope_scale_local, is_local=True
    )
    CROPS_PER_IMAGE.reset(before)
    return globals_, locals_


def see_global_crops(
    backbone: nn.Module, batch: StudentBatch, options: TaskOptions, scalars: StepScalars
) -> Features:
    """The features of its global crops, [2 * images, image-major]."""
    wanted = options.mean, options.std, options.crop_scale
    pixels = batch.crops.pixels(*wanted, is_local=False)
    return _see_global(backbone, pixels, batch, options, scalars)


def _see_global(
    backbone: nn.Module,
    pixels: Tensor,
    batch: StudentBatch,
    options: TaskOptions,
    scalars: StepScalars,
) -> Features:
    masks = batch.masks.flags.flatten(0, 1) if options.masks_input else None
    depth = None if batch.active_rows is None else batch.active_rows[:, :NUM_GLOBAL]
    before = CROPS_PER_IMAGE.set(NUM_GLOBAL)
    found = _see(backbone, pixels, depth, options, masks, scalars.rope_scale_global, is_local=False)
    CROPS_PER_IMAGE.reset(before)
    return found


def _see(
    backbone: nn.Module,
    pixels: Tensor,
    depth: Tensor | None,
    options: TaskOptions,
    masks: Tensor | None,
    rope_scale: RopeScale,
    *,
    is_local: bool,
) -> Features:
    network: Callable[..., Features] = backbone  # a ``Backbone``; ViTs take ``active_rows`` too
    rows: dict[str, ActiveRows] = {}
    if depth is not None:
        rows = {"active_rows": active_rows(depth, options.survival, pixels.device)}
    dtype = next(backbone.parameters()).dtype
    return network(pixels.to(dtype), masks, rope_scale=rope_scale, is_local=is_local, **rows)
