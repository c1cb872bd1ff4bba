"""The closed table of names, and the shapes of all students. Pure Python."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType

from teacher.shapes import HeadShape, ViTSpec

STEM = 4  # pixels per side of a ConvNeXt's first convolution; each later stage halves the map


@dataclass(frozen=True)
class ConvNeXtSpec:
    """Blocks and channels of each stage."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    in_channels: int = 3
    layerscale_init: float = 1e-6

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


@dataclass(frozen=True)
class CustomSpec:
    """Where a network comes from, and its description. ``args_json`` are the factory's arguments."""

    factory: str
    args_json: str
    width: int
    stride: int
    parameters: int
    in_channels: int = 3


BackboneSpec = ViTSpec | ConvNeXtSpec | CustomSpec

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
