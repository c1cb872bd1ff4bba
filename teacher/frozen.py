"""A frozen network as a source of targets: crops in, bottlenecks or features out, in micro-batches of one fixed shape.

The fixed shape (a padded last micro-batch) makes each image's targets independent of how many
images a rank was given, so any division of the batch gives the same bits. Only what travels is
computed: class rows, and rows of masked patches. The same class serves the frozen teacher of a
family, with or without heads, and the EMA network of pretraining, whose weights are replaced every
step.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from teacher.batch import (
    Backbone,
    CropBatch,
    Features,
    PatchMasks,
    TeacherTargets,
    normalise,
)
from teacher.gram import resize_grid
from teacher.heads import Head
from teacher.vit import Block

HEAD_ROWS = 256  # masked patches the iBOT head takes at once, the last block padded


@dataclass(frozen=True)
class Anchor:
    """The Gram reference: a frozen backbone that looks at larger versions of the same crops."""

    backbone: nn.Module
    grid_hw: tuple[int, int]


class FrozenTeacher(nn.Module):
    """Backbone and heads without gradients.

    Args:
        backbone: any ``Backbone``.
        dino_head: head on class tokens; its prototypes are what students' targets refer to. None
            for a teacher without heads: its targets are the features themselves.
        ibot_head: head on patch tokens; None together with ``dino_head``.
        mean: RGB mean in [0, 1] that the backbone was trained with.
        std: RGB standard deviation.
        micro_images: images per forward pass (two global crops each).

    ``min_forwards``: passes of every ``teach``, with nothing in them where there are no images; for
    sharded backbones, whose ranks work in step.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dino_head: Head | None,
        ibot_head: Head | None,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        micro_images: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head
        self.anchor: Anchor | None = None
        self.min_forwards = 0
        self.mean, self.std, self.micro_images = mean, std, micro_images
        self.requires_grad_(False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in, and what travels."""
        return next(self.backbone.parameters()).dtype

    def shard(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Leaves each rank of ``group`` its part of the backbone (ZeRO-3): a block is gathered when it works, then let go.

        The backbone may be on the CPU: its parts go to ``device``. From now on every forward pass is
        collective over ``group``; set ``min_forwards`` so that all ranks make as many.

        Source: Rajbhandari et al. 2020 (ZeRO, stage 3), as PyTorch's ``fully_shard``.
        """
        from torch.distributed.fsdp import fully_shard  # costs 0.4 s, for few

        mesh = DeviceMesh.from_group(group, device.type)
        blocks = [module for module in self.backbone.modules() if isinstance(module, Block)]
        for module in (*blocks, self.backbone):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)

    @torch.no_grad()
    def teach(self, crops: CropBatch, masks: PatchMasks) -> TeacherTargets:
        """Targets for every image of ``crops``: one backbone forward per image, none for an empty batch.

        No communication, unless the backbone is sharded.
        """
        num_images = crops.global_crops.shape[0]
        class_rows, patch_rows = [], []
        for start in range(0, num_images, self.micro_images):
            stop = min(start + self.micro_images, num_images)
            features = self._forward(
                self.backbone, crops.global_crops[start:stop], _part(crops.colours, start, stop)
            )
            tokens = features.class_token
            spoken = tokens if self.dino_head is None else self.dino_head(tokens)
            class_rows.append(spoken[: 2 * (stop - start)])
            wanted = masks.part(slice(start, stop)).rows()
            patch_rows.append(features.patch_tokens.flatten(0, 1).index_select(0, wanted))
        for _ in range(len(class_rows), self.min_forwards):
            self._forward(self.backbone, crops.global_crops[:0], None)
        if not class_rows:
            return self._nothing(crops.global_crops.device)
        return TeacherTargets(
            class_rows=torch.cat(class_rows).unflatten(0, (num_images, 2)),
            patch_rows=self._patch_rows(torch.cat(patch_rows)),
            anchor_patches=self._anchor_patches(crops),
        )

    def _forward(
        self,
        backbone: nn.Module,
        crops: UInt8[Tensor, "images 2 3 height width"],
        colours: Float[Tensor, "images 2 3"] | None,
    ) -> Features:
        missing = self.micro_images - crops.shape[0]
        pixels = normalise(crops, self.mean, self.std, self.dtype, colours).flatten(0, 1)
        if missing:
            pixels = torch.cat([pixels, pixels.new_zeros(2 * missing, *pixels.shape[1:])])
        seer: Backbone = backbone  # type: ignore[assignment]  # nn.Module that satisfies the protocol
        return seer(pixels)

    def _patch_rows(self, masked: Float[Tensor, "masked width"]) -> Float[Tensor, "masked taught"]:
        if self.ibot_head is None:
            return masked
        padding = -masked.shape[0] % HEAD_ROWS
        padded = torch.cat([masked, masked.new_zeros(padding, masked.shape[1])])
        blocks = [self.ibot_head(block) for block in padded.split(HEAD_ROWS) if block.shape[0]]
        if not blocks:
            return masked.new_zeros(0, self.ibot_head.shape.bottleneck)
        return torch.cat(blocks)[: masked.shape[0]]

    def _anchor_patches(self, batch: CropBatch) -> Tensor | None:
        if self.anchor is None:
            return None
        crops = batch.anchor_crops
        assert crops is not None, "an anchor without anchor crops"
        rows = []
        for start in range(0, crops.shape[0], self.micro_images):
            stop = min(start + self.micro_images, crops.shape[0])
            colours = _part(batch.colours, start, stop)
            features = self._forward(self.anchor.backbone, crops[start:stop], colours)
            patches = features.patch_tokens[: 2 * (stop - start)]
            rows.append(resize_grid(patches, features.grid_hw, self.anchor.grid_hw, "bicubic"))
        return torch.cat(rows).unflatten(0, (crops.shape[0], 2))

    def _nothing(self, device: torch.device) -> TeacherTargets:
        nothing = torch.zeros(0, dtype=self.dtype, device=device)
        seer: Backbone = self.backbone  # type: ignore[assignment]
        class_width, patch_width = (
            seer.width if head is None else head.shape.bottleneck
            for head in (self.dino_head, self.ibot_head)
        )
        anchor_patches = None
        if self.anchor is not None:
            seer = self.anchor.backbone  # type: ignore[assignment]
            patches = self.anchor.grid_hw[0] * self.anchor.grid_hw[1]
            anchor_patches = nothing.new_zeros(0, 2, patches, seer.width)
        return TeacherTargets(
            nothing.new_zeros(0, 2, class_width), nothing.new_zeros(0, patch_width), anchor_patches
        )


def _part(colours: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if colours is None else colours[start:stop]
