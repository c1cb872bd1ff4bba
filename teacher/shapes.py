"""Shapes of networks, and the numbers that a plan needs of the method. Pure Python: planning imports no torch."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

KOLEO_GROUP = 16  # images; DINOv3 report, section 3.1
# fastest of 512..16384 on CPU for 65,536 prototypes; memory is rows * 4096
PROTOTYPES_AT_ONCE = 4096


@dataclass(frozen=True)
class ViTSpec:
    """Shape of a vision transformer.

    ``untie_local_norm`` gives the class token of local crops a separate final norm, in training.
    """

    width: int
    depth: int
    heads: int
    ffn_width: int
    patch: int = 16
    ffn: Literal["mlp", "swiglu"] = "mlp"
    qv_bias: bool = True
    registers: int = 4
    in_channels: int = 3
    untie_local_norm: bool = False
    layerscale_init: float = 1e-5

    def __post_init__(self) -> None:
        if (
            min(self.width, self.depth, self.heads, self.ffn_width, self.patch, self.in_channels)
            < 1
        ):
            raise ValueError(f"{self}: every size must be at least 1")
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"width {self.width} with {self.heads} heads: "
                "the width of a head must be a multiple of 4 (RoPE)"
            )

    @property
    def stride(self) -> int:
        """Pixels per patch side."""
        return self.patch

    @property
    def parameters(self) -> int:
        """Number of parameters; the k bias, always zero, is none."""
        width, hidden = self.width, self.ffn_width
        tokens = (2 + self.registers) * width
        patches = (self.in_channels * self.patch**2 + 1) * width
        norms = 2 * width * (2 if self.untie_local_norm else 1)
        attention = 4 * width**2 + (1 + 2 * self.qv_bias) * width
        matrices = 3 if self.ffn == "swiglu" else 2
        ffn = matrices * width * hidden + (matrices - 1) * hidden + width
        block = 4 * width + attention + 2 * width + ffn  # two norms, two layer scales
        return tokens + patches + norms + self.depth * block


@dataclass(frozen=True)
class HeadShape:
    """Input width, hidden width, bottleneck width and number of prototypes of one head."""

    width: int
    hidden: int
    bottleneck: int
    prototypes: int

    @property
    def parameters(self) -> int:
        """Weights and biases of the three layers, and the prototypes."""
        layers = pairwise((self.width, self.hidden, self.hidden, self.bottleneck))
        return sum((a + 1) * b for a, b in layers) + self.prototypes * self.bottleneck


def scaled_size(size: int, scale: float) -> int:
    """Pixels per side of a crop that a network sees at a part of its size."""
    return round(size * scale)
