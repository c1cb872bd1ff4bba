"""The closed table of names, and the shapes of all students. Pure Python: planning imports no torch.

A spec knows its network: what it costs, how it is built and how its weights begin. Everything else
asks the spec and does not ask which kind of network it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from teacher.shapes import FP32_BYTES, NORM_BYTES, VALUE_BYTES, HeadShape, ViTSpec

if TYPE_CHECKING:
    import torch

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[\w./-]+")  # of a network from outside
CONVNEXT_NORM_EPS = 1e-6
NUM_STAGES = 4  # of the published ConvNeXts
STEM = 4  # pixels per side of a ConvNeXt's first convolution; each later stage halves the map
# Saved for the backward pass in bf16: a block's input, the norm's input and output, the wide layer before and
# after its GELU, the scale's input
CONV_BLOCK_BYTES = 24  # per pixel, channel and ConvNeXt block
FORWARD_CONV = (
    11  # numbers per pixel and channel at the highest moment of a block without a gradient
)


@runtime_checkable
class BackboneSpec(Protocol):
    """The shape of a network, and everything that follows from the shape. A crop is a square of ``size`` pixels per side."""

    @property
    def width(self) -> int:
        """Channels of the class feature and of the patch features."""
        ...

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        ...

    @property
    def stride(self) -> int:
        """Pixels per side of one patch."""
        ...

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        ...

    @property
    def unpublished(self) -> Mapping[str, tuple[float, float]]:
        """Numbers that are not those of the published networks, by name: its value, and theirs."""
        ...

    @property
    def probe_call(self) -> str:
        """Python that makes the spec of a network from outside (``students.custom``); empty for a network of ours."""
        ...

    @property
    def equal_blocks(self) -> int:
        """Number of blocks of one size that hold nearly all parameters; 1 where there are none."""
        ...

    @property
    def has_batch_norm(self) -> bool:
        """Whether images of a batch are normalised together."""
        ...

    @property
    def untie_local_norm(self) -> bool:
        """Whether the class token of local crops has another final norm in training."""
        ...

    @property
    def exported(self) -> "BackboneSpec":
        """The shape without what acts in training only and is not exported."""
        ...

    def flops(self, size: int) -> float:
        """Operations of one forward pass on one crop; a multiply-add counts as two."""
        ...

    def first_layer_flops(self, size: int) -> float:
        """Operations of the first layer, whose input needs no gradient; 0 where the layer is not known."""
        ...

    def activation_bytes(self, size: int) -> float:
        """Bytes kept for the backward pass of one crop, in bf16."""
        ...

    def forward_bytes(self, size: int) -> float:
        """Bytes at the highest moment of one forward pass without a gradient, on one crop in fp32; without weights."""
        ...

    def build(self) -> "torch.nn.Module":
        """Build the network; load weights or call ``init_`` before using the network."""
        ...

    def init_(self, network: "torch.nn.Module", generator: "torch.Generator") -> None:
        """Give a network that ``build`` made fresh weights, a function of ``generator`` alone.

        Raises:
            ValueError: the network is of another kind.
        """
        ...


@dataclass(frozen=True)
class ConvNeXtSpec:
    """Blocks and channels of each stage."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    in_channels: int = 3
    layerscale_init: float = 1e-6
    norm_eps: float = CONVNEXT_NORM_EPS

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.widths) or len(self.depths) < 2:
            raise ValueError(
                f"depths {list(self.depths)} and widths {list(self.widths)}: "
                "need one of each per stage, two stages at least"
            )
        if min(*self.depths, *self.widths, self.in_channels) < 1:
            raise ValueError(f"{self}: every size must be at least 1")

    @property
    def width(self) -> int:
        """Channels of the last stage."""
        return self.widths[-1]

    @property
    def stride(self) -> int:
        """Pixels per side of one patch of the last map."""
        return int(STEM * 2 ** (len(self.depths) - 1))

    @property
    def unpublished(self) -> Mapping[str, tuple[float, float]]:
        """Numbers that are not those of the published networks, by name: its value, and theirs."""
        values = {
            "norm epsilon": (self.norm_eps, CONVNEXT_NORM_EPS),
            "number of stages": (len(self.depths), NUM_STAGES),
        }
        return {name: pair for name, pair in values.items() if pair[0] != pair[1]}

    @property
    def probe_call(self) -> str:
        """Python that makes the spec of a network from outside (``students.custom``); empty for a network of ours."""
        return ""

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        first = self.widths[0]
        count = (self.in_channels * STEM**2 + 1) * first + 2 * first + 2 * self.width
        for before, after in pairwise(self.widths):  # norm and halving convolution
            count += 2 * before + (4 * before + 1) * after
        for depth, width in zip(self.depths, self.widths, strict=True):
            block = (49 + 1) * width + 2 * width + (8 * width + 5) * width + width
            count += depth * block
        return count

    @property
    def equal_blocks(self) -> int:
        """1: the blocks of different stages differ in size."""
        return 1

    @property
    def has_batch_norm(self) -> bool:
        """False: its norms are of each pixel."""
        return False

    @property
    def untie_local_norm(self) -> bool:
        """False: all crops share the final norm."""
        return False

    @property
    def exported(self) -> "ConvNeXtSpec":
        """The same shape: nothing acts in training only."""
        return self

    def flops(self, size: int) -> float:
        """Operations of one forward pass on one crop of ``size`` pixels per side; a multiply-add counts as two."""
        side = size // STEM
        flops = self.first_layer_flops(size)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            if stage:
                side //= 2
                flops += 2.0 * side**2 * 4 * self.widths[stage - 1] * width
            flops += depth * 2.0 * side**2 * (49 * width + 8 * width**2)
        return flops

    def first_layer_flops(self, size: int) -> float:
        """Operations of the stem, whose input needs no gradient."""
        return 2.0 * (size // STEM) ** 2 * self.in_channels * STEM**2 * self.widths[0]

    def activation_bytes(self, size: int) -> float:
        """Bytes kept for the backward pass of one crop of ``size`` pixels per side, in bf16."""
        pixels = (size // STEM) ** 2
        num_bytes = VALUE_BYTES * self.in_channels * size**2
        num_bytes += pixels * (VALUE_BYTES * self.widths[0] + NORM_BYTES)  # the stem's norm
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            if stage:  # input of the norm, and of the halving convolution
                num_bytes += pixels * (2 * VALUE_BYTES * self.widths[stage - 1] + NORM_BYTES)
                pixels //= 4
            num_bytes += depth * pixels * (CONV_BLOCK_BYTES * width + NORM_BYTES)
        return float(num_bytes + (pixels + 1) * (VALUE_BYTES * self.width + NORM_BYTES))

    def forward_bytes(self, size: int) -> float:
        """Bytes at the highest moment of one forward pass without a gradient, in fp32: a block of the first stage, its wide layer before and after GELU."""
        pixels = (size // STEM) ** 2
        return float(
            FP32_BYTES * (2 * self.in_channels * size**2 + pixels * FORWARD_CONV * self.widths[0])
        )

    def build(self) -> "torch.nn.Module":
        """Build the network."""
        from students.convnext import ConvNeXt

        return ConvNeXt(self)

    def init_(self, network: "torch.nn.Module", generator: "torch.Generator") -> None:
        """Give ``network`` fresh weights drawn from ``generator``.

        Raises:
            ValueError: the network is no ConvNeXt.
        """
        from students.convnext import ConvNeXt, init_convnext_

        if not isinstance(network, ConvNeXt):
            raise ValueError(f"{type(network).__name__}: this spec initialises a ConvNeXt")
        init_convnext_(network, generator)


@dataclass(frozen=True)
class CustomSpec:
    """Where a network comes from, and its description. ``args_json`` are the factory's arguments."""

    factory: str
    args_json: str
    width: int
    stride: int
    parameters: int
    in_channels: int = 3
    has_batch_norm: bool = False

    @property
    def untie_local_norm(self) -> bool:
        """False: the network does not know which crops are local."""
        return False

    @property
    def unpublished(self) -> Mapping[str, tuple[float, float]]:
        """Nothing: there is no published network of its kind."""
        return {}

    @property
    def probe_call(self) -> str:
        """Python that makes this spec."""
        return f"probe({self.factory!r}, {self.args_json!r})"

    @property
    def equal_blocks(self) -> int:
        """1: the inside of the network is not known."""
        return 1

    @property
    def exported(self) -> "CustomSpec":
        """The same shape: every tensor is exported."""
        return self

    def flops(self, size: int) -> float:
        """Operations of one forward pass on one crop of ``size`` pixels per side, counted on the built network."""
        from students.custom import count_flops

        return count_flops(self, size)

    def first_layer_flops(self, size: int) -> float:  # noqa: ARG002  # part of the protocol
        """0: the first layer of the network is not known."""
        return 0.0

    def activation_bytes(self, size: int) -> float:
        """Bytes kept for the backward pass of one crop: one per pixel and feature, a guess at a network whose inside is not known."""
        return float(size**2 * self.width)

    def forward_bytes(self, size: int) -> float:
        """Bytes at the highest moment of one forward pass without a gradient: as many as for the backward pass, a guess."""
        return self.activation_bytes(size)

    def build(self) -> "torch.nn.Module":
        """Build the network, with the weights that its factory gives."""
        from students.custom import build_custom

        return build_custom(self)

    def init_(self, network: "torch.nn.Module", generator: "torch.Generator") -> None:
        """Give ``network`` the weights that its factory gives under a seed drawn from ``generator``.

        Raises:
            ValueError: the network is no adapted network.
        """
        from students.custom import Adapted, init_custom_

        if not isinstance(network, Adapted):
            raise ValueError(f"{type(network).__name__}: this spec initialises a custom network")
        init_custom_(network, generator)


CATALOG: Mapping[str, BackboneSpec] = MappingProxyType(
    {
        "vits16": ViTSpec(384, 12, 6, 1536),
        "vits16plus": ViTSpec(384, 12, 6, 1536, ffn="swiglu"),
        "vitb16": ViTSpec(768, 12, 12, 3072),
        "vitl16": ViTSpec(1024, 24, 16, 4096),
        "vith16plus": ViTSpec(1280, 32, 20, 5120, ffn="swiglu"),
        "vit7b16": ViTSpec(4096, 40, 32, 8192, ffn="swiglu", qv_bias=False),
        "convnext_tiny": ConvNeXtSpec((3, 3, 9, 3), (96, 192, 384, 768)),
        "convnext_small": ConvNeXtSpec((3, 3, 27, 3), (96, 192, 384, 768)),
        "convnext_base": ConvNeXtSpec((3, 3, 27, 3), (128, 256, 512, 1024)),
        "convnext_large": ConvNeXtSpec((3, 3, 27, 3), (192, 384, 768, 1536)),
    }
)


def student_heads(
    width: int, dino: HeadShape, ibot: HeadShape, dino_hidden: int, ibot_hidden: int
) -> tuple[HeadShape, HeadShape]:
    """Head shapes of a student: its input and hidden widths, the teacher's bottlenecks and prototype counts."""
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
