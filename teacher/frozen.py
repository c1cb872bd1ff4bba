"""A frozen network as a source of targets: crops in, bottlenecks or features out, in micro-batches of one fixed shape.

The fixed shape (a padded last micro-batch) makes each image's targets independent of how many
images a rank was given, so any division of the batch gives the same bits. Only what travels is
computed: class rows, and rows of masked patches. The same class serves the frozen teacher of a
family, with or without heads, and the EMA network of pretraining, whose weights are replaced every
step.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from teacher.batch import (
    Backbone,
    CropBatch,
    Features,
    PatchMasks,
    TeacherTargets,
    normalise,
    resize_grid,
    shrunk,
)
from teacher.heads import Head
from teacher.shapes import scaled_size
from teacher.vit import Block

HEAD_ROWS = 256  # masked patches the iBOT head takes at once, the last block padded


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
        crop_scale: it sees crops at this part of their size; targets and masks lie on the grid of that size.

    ``anchor``: the Gram reference, a frozen backbone that looks at larger versions of the same crops
    (``use_anchor``); None without.
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
        crop_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head
        self._anchor: nn.Module | None = None
        self._min_forwards = 0
        self.mean, self.std, self.micro_images = mean, std, micro_images
        self.crop_scale = crop_scale
        self.requires_grad_(False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in, and what travels."""
        return next(self.backbone.parameters()).dtype

    def shard(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Leaves each rank of ``group`` its part of the backbone. From now on every forward pass is collective over it.

        The backbone may be on the CPU: its parts go to ``device``. Call ``pad_forwards`` so that all
        ranks make as many passes.
        """
        shard_blocks(self.backbone, group, device)

    def pad_forwards(self, most_images: int) -> None:
        """From now on every ``teach`` makes as many forward passes as ``most_images`` take, empty ones where there are no images.

        For sharded backbones: their ranks gather each block together, whatever their shares.
        """
        self._min_forwards = -(-most_images // self.micro_images)

    @property
    def anchor(self) -> nn.Module | None:
        """The Gram reference; None without."""
        return self._anchor

    def use_anchor(self, anchor: nn.Module | None) -> None:
        """From now on ``teach`` makes the patch features of this frozen backbone too; None for no longer."""
        self._anchor = anchor

    @torch.no_grad()
    def teach(self, crops: CropBatch, masks: PatchMasks) -> TeacherTargets:
        """Targets for every image of ``crops``: one backbone forward per image, none for an empty batch.

        No communication, unless the backbone is sharded.
        """
        num_images = crops.global_crops.shape[0]
        class_features, patch_features = [], []
        for start in range(0, num_images, self.micro_images):
            stop = min(start + self.micro_images, num_images)
            features = self._forward(
                self.backbone, crops.global_crops[start:stop], _part(crops.pixel_stats, start, stop)
            )
            tokens = features.class_token
            class_bottleneck = tokens if self.dino_head is None else self.dino_head(tokens)
            class_features.append(class_bottleneck[: 2 * (stop - start)])
            wanted = masks.part(slice(start, stop)).rows()
            patch_features.append(features.patch_tokens.flatten(0, 1).index_select(0, wanted))
        for _ in range(len(class_features), self._min_forwards):
            self._forward(self.backbone, crops.global_crops[:0], None)
        anchor_patches = self._anchor_patches(crops)
        if not class_features:
            return self._nothing(crops.global_crops.device, anchor_patches)
        return TeacherTargets(
            class_features=torch.cat(class_features).unflatten(0, (num_images, 2)),
            patch_features=self._patch_features(torch.cat(patch_features)),
            anchor_patches=anchor_patches,
        )

    def _forward(
        self,
        backbone: nn.Module,
        crops: UInt8[Tensor, "images 2 3 height width"],
        pixel_stats: Float[Tensor, "images 2 3"] | None,
    ) -> Features:
        missing = self.micro_images - crops.shape[0]
        pixels = self._pixels(crops, pixel_stats)
        if missing:
            pixels = torch.cat([pixels, pixels.new_zeros(2 * missing, *pixels.shape[1:])])
        network: Backbone = backbone  # type: ignore[assignment]  # nn.Module that satisfies the protocol
        return network(pixels)

    def _pixels(
        self,
        crops: UInt8[Tensor, "images 2 3 height width"],
        pixel_stats: Float[Tensor, "images 2 3"] | None,
    ) -> Float[Tensor, "rows 3 scaled_height scaled_width"]:
        if self.crop_scale == 1.0:
            return normalise(crops, self.mean, self.std, self.dtype, pixel_stats).flatten(0, 1)
        pixels = normalise(crops, self.mean, self.std, torch.float32, pixel_stats).flatten(0, 1)
        if not len(pixels):
            size = [scaled_size(side, self.crop_scale) for side in pixels.shape[2:]]
            return pixels.new_zeros(0, pixels.shape[1], *size, dtype=self.dtype)
        return shrunk(pixels, self.crop_scale).to(self.dtype)

    def _patch_features(
        self, masked: Float[Tensor, "masked width"]
    ) -> Float[Tensor, "masked teacher_dim"]:
        if self.ibot_head is None:
            return masked
        padding = -masked.shape[0] % HEAD_ROWS
        padded = torch.cat([masked, masked.new_zeros(padding, masked.shape[1])])
        blocks = [self.ibot_head(block) for block in padded.split(HEAD_ROWS) if block.shape[0]]
        if not blocks:
            return masked.new_zeros(0, self.ibot_head.shape.bottleneck)
        return torch.cat(blocks)[: masked.shape[0]]

    @torch.no_grad()
    def refresh_anchor(self) -> None:
        """The anchor becomes what the backbone is now. No communication: both are sharded alike or not at all."""
        assert self._anchor is not None, "an anchor to refresh"
        now = dict(self.backbone.named_parameters())
        for name, parameter in self._anchor.named_parameters():
            _local(parameter).copy_(_local(now[name]))

    def is_finite_here(self) -> Tensor:
        """Every weight that this rank holds is finite, on the device. No communication."""
        return torch.stack([_local(p).isfinite().all() for p in self.parameters()]).all()

    def anchor_state(self) -> dict[str, Tensor]:
        """The anchor's full weights by name, nothing without an anchor. Collective where it is sharded."""
        if self._anchor is None:
            return {}
        return {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in self._anchor.state_dict().items()
        }

    def _anchor_patches(self, batch: CropBatch) -> Tensor | None:
        if self._anchor is None:
            return None
        crops = batch.anchor_crops
        assert crops is not None, "an anchor without anchor crops"
        rows = []
        for start in range(0, crops.shape[0], self.micro_images):
            stop = min(start + self.micro_images, crops.shape[0])
            pixel_stats = _part(batch.pixel_stats, start, stop)
            features = self._forward(self._anchor, crops[start:stop], pixel_stats)
            patches = features.patch_tokens[: 2 * (stop - start)]
            rows.append(
                resize_grid(patches, features.grid_hw, self._grid_hw(batch.global_crops), "bicubic")
            )
        for _ in range(len(rows), self._min_forwards):
            self._forward(self._anchor, crops[:0], None)
        if not rows:
            return self._no_patches(batch.global_crops)
        return torch.cat(rows).unflatten(0, (crops.shape[0], 2))

    def _grid_hw(self, crops: Tensor) -> tuple[int, int]:
        """The backbone's patch grid on crops of this size, as it sees them."""
        network: Backbone = self.backbone  # type: ignore[assignment]
        height, width = (scaled_size(side, self.crop_scale) for side in crops.shape[-2:])
        return height // network.stride, width // network.stride

    def _no_patches(self, crops: Tensor) -> Tensor:
        network: Backbone = self.backbone  # type: ignore[assignment]
        height, width = self._grid_hw(crops)
        return torch.zeros(
            0, 2, height * width, network.width, dtype=self.dtype, device=crops.device
        )

    def _nothing(self, device: torch.device, anchor_patches: Tensor | None) -> TeacherTargets:
        nothing = torch.zeros(0, dtype=self.dtype, device=device)
        network: Backbone = self.backbone  # type: ignore[assignment]
        class_width, patch_width = (
            network.width if head is None else head.shape.bottleneck
            for head in (self.dino_head, self.ibot_head)
        )
        return TeacherTargets(
            nothing.new_zeros(0, 2, class_width), nothing.new_zeros(0, patch_width), anchor_patches
        )


def shard_blocks(backbone: nn.Module, group: dist.ProcessGroup, device: torch.device) -> None:
    """Leaves each rank of ``group`` its part of a frozen backbone (ZeRO-3): a block is gathered when it works, then let go.

    Source: Rajbhandari et al. 2020 (ZeRO, stage 3), as PyTorch's ``fully_shard``.
    """
    from torch.distributed.fsdp import fully_shard  # costs 0.4 s, for few

    mesh = DeviceMesh.from_group(group, device.type)
    blocks = [module for module in backbone.modules() if isinstance(module, Block)]
    for module in (*blocks, backbone):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part(pixel_stats: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if pixel_stats is None else pixel_stats[start:stop]
