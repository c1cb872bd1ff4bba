"""A student: a catalogue or free-size backbone with heads that speak the teacher's language (same bottlenecks, same prototypes)."""

import zlib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from students.shapes import BackboneSpec
from teacher.heads import Head, init_head_
from teacher.shapes import HeadShape

CPU = torch.device("cpu")


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one network's initial weights: a function of the run's seed and the name, nothing else."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def build_empty(
    build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A network of unwritten memory on ``device``; of code from outside, with the weights that it gives.

    It is built without memory first: nothing of its size passes through the host, or is held in fp32 for a
    network in bf16.
    """
    with torch.device("meta"):
        network = build().to(dtype)
    if any(tensor.is_meta for tensor in network.state_dict().values()):
        return network.to_empty(device=device)
    return network.to(device)  # code from outside is built where it can run


def build_backbone(
    spec: BackboneSpec,
    generator: torch.Generator,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A backbone with fresh weights: the same numbers on every device, rounded to ``dtype``."""
    backbone = build_empty(spec.build, device, dtype)
    spec.init_(backbone, generator)
    return backbone


def build_network(
    spec: BackboneSpec,
    shapes: tuple[HeadShape, HeadShape],
    generator: torch.Generator,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, Head, Head]:
    """Backbone and both heads with fresh weights, as ``build_backbone``."""
    backbone = build_backbone(spec, generator, device, dtype)
    return backbone, *build_heads(shapes, generator, device, dtype)


def build_heads(
    shapes: tuple[HeadShape, HeadShape],
    generator: torch.Generator,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> tuple[Head, Head]:
    """DINO and iBOT head with fresh weights, as ``build_backbone``."""
    dino, ibot = (build_empty(partial(Head, shape), device, dtype) for shape in shapes)
    assert isinstance(dino, Head) and isinstance(ibot, Head), "as built"
    for head in (dino, ibot):
        init_head_(head, generator)
    return dino, ibot
