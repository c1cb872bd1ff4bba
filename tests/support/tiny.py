"""The smallest network, teacher and batch on which the objective can be computed."""

import torch
from torch import Tensor, nn

from teacher.batch import CropBatch, PatchMasks, StudentBatch
from teacher.frozen import FrozenTeacher
from teacher.heads import Head, init_head_
from teacher.shapes import HeadShape, ViTSpec
from teacher.vit import ViT, init_vit_

SPEC = ViTSpec(width=16, depth=1, heads=2, ffn_width=32, patch=8, layerscale_init=0.5)


HEAD = HeadShape(width=16, hidden=12, bottleneck=6, prototypes=20)


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


IMAGES, LOCALS = 5, 3


def network(seed: int) -> tuple[nn.Module, Head, Head]:
    generator = torch.Generator().manual_seed(seed)
    vit = ViT(SPEC)
    init_vit_(vit, generator)
    heads = Head(HEAD), Head(HEAD)
    for head in heads:
        init_head_(head, generator)
    return vit, *heads


def teacher(
    micro_images: int = 2, *, has_heads: bool = True, crop_scale: float = 1.0
) -> FrozenTeacher:
    backbone, *heads = network(2)
    dino, ibot = heads if has_heads else (None, None)
    stats = {"mean": MEAN, "std": STD}
    return FrozenTeacher(
        backbone, dino, ibot, **stats, micro_images=micro_images, crop_scale=crop_scale
    )


def crops(images: int = IMAGES, *, with_anchor: bool = False) -> CropBatch:
    generator = torch.Generator().manual_seed(9)

    def draw(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    anchors = draw(images, 2, 3, 32, 32) if with_anchor else None
    return CropBatch(draw(images, 2, 3, 16, 16), draw(images, LOCALS, 3, 8, 8), anchors)


def masks(images: int = IMAGES) -> Tensor:
    drawn = torch.rand(images, 2, 4, generator=torch.Generator().manual_seed(4)) < 0.4
    drawn[0, 0] = False  # a crop without a mask
    return drawn


def student_batch(taught: FrozenTeacher, images: int = IMAGES) -> StudentBatch:
    batch = crops(images, with_anchor=taught.anchor is not None)
    targets = taught.teach(batch, PatchMasks.of(masks(images)))
    return StudentBatch(batch, PatchMasks.of(masks(images)), targets, (2, 2), 0, images)
