"""Weights of small networks, in memory and in folders."""

from pathlib import Path

import torch
from torch import Tensor

from distill.export.save import ExportFacts, write_backbone
from distill.weights.layouts import Layout, origins
from students.shapes import BackboneSpec, ConvNeXtSpec
from teacher.heads import Head, init_head_
from teacher.shapes import HeadShape, ViTSpec

SMALL: dict[str, BackboneSpec] = {
    "mlp": ViTSpec(32, 2, 2, 64, patch=8),
    "swiglu": ViTSpec(32, 2, 2, 64, patch=8, ffn="swiglu"),
    "no bias": ViTSpec(32, 2, 2, 64, ffn="swiglu", qv_bias=False, in_channels=4, registers=2),
    "convnext": ConvNeXtSpec((1, 2, 1), (8, 12, 16)),
}


def random_weights(spec: BackboneSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    own = spec.build().state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in own.items()}


def translate(
    weights: dict[str, Tensor], spec: BackboneSpec, source: Layout, target: Layout
) -> dict[str, Tensor]:
    return {
        name: origin.make(*(weights[part] for part in origin.sources))
        for name, origin in origins(spec, source, target).items()
    }


VIT = ViTSpec(width=16, depth=1, heads=2, ffn_width=32, patch=8)


FACTS = ExportFacts(64, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), {"recipe": "test"})


HEAD = HeadShape(width=16, hidden=12, bottleneck=6, prototypes=20)


def folder_of(path: Path, spec: BackboneSpec = VIT) -> Path:
    write_backbone(path, random_weights(spec), spec, FACTS)
    return path


def heads() -> dict[str, Tensor]:
    tensors = {}
    for name in ("dino_head", "ibot_head"):
        head = Head(HEAD)
        init_head_(head, torch.Generator().manual_seed(1))
        tensors |= {f"{name}.{key}": value for key, value in head.state_dict().items()}
    return tensors
