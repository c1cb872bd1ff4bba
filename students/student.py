"""A student: a catalogue or free-size backbone with heads that speak the teacher's language (same bottlenecks, same prototypes)."""

import zlib
from dataclasses import replace

import torch

from students.catalog import BackboneSpec, build_backbone, init_weights_
from teacher.heads import Head, HeadShape, init_head_


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one network's initial weights: a function of the run's seed and the name, nothing else."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def build_network(
    spec: BackboneSpec, dino: HeadShape, ibot: HeadShape, generator: torch.Generator
) -> tuple[torch.nn.Module, Head, Head]:
    """Backbone and both heads with fresh weights, fp32 on the CPU."""
    backbone = build_backbone(spec)
    init_weights_(backbone, generator)
    return backbone, *build_heads(dino, ibot, generator)


def build_heads(dino: HeadShape, ibot: HeadShape, generator: torch.Generator) -> tuple[Head, Head]:
    """Both heads with fresh weights, fp32 on the CPU."""
    heads = Head(dino), Head(ibot)
    for head in heads:
        init_head_(head, generator)
    return heads


def student_heads(
    width: int, dino: HeadShape, ibot: HeadShape, dino_hidden: int, ibot_hidden: int
) -> tuple[HeadShape, HeadShape]:
    """Head shapes of a student: its own input and hidden widths, the teacher's bottlenecks and prototype counts."""
    return replace(dino, width=width, hidden=dino_hidden), replace(
        ibot, width=width, hidden=ibot_hidden
    )


def grid_of(spec: BackboneSpec, size: int) -> tuple[int, int]:
    """The patch grid (height, width) of a square crop of ``size`` pixels.

    Raises:
        ValueError: the size is not a multiple of the network's stride.
    """
    stride = spec.stride
    if size % stride:
        raise ValueError(f"crop of {size} px: not a multiple of the network's stride {stride}")
    return size // stride, size // stride
