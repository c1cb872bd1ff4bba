"""A student: a catalogue or free-size backbone with heads that speak the teacher's language (same bottlenecks, same prototypes)."""

import zlib

import torch

from students.shapes import BackboneSpec
from teacher.heads import Head, init_head_
from teacher.shapes import HeadShape


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one network's initial weights: a function of the run's seed and the name, nothing else."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def build_network(
    spec: BackboneSpec, dino: HeadShape, ibot: HeadShape, generator: torch.Generator
) -> tuple[torch.nn.Module, Head, Head]:
    """Backbone and both heads with fresh weights, fp32 on the CPU."""
    backbone = spec.build()
    spec.init_(backbone, generator)
    return backbone, *build_heads(dino, ibot, generator)


def build_heads(dino: HeadShape, ibot: HeadShape, generator: torch.Generator) -> tuple[Head, Head]:
    """Both heads with fresh weights, fp32 on the CPU."""
    heads = Head(dino), Head(ibot)
    for head in heads:
        init_head_(head, generator)
    return heads
