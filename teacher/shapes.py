"""Shapes of networks, and the numbers that a plan needs of the method. Pure Python: planning imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

KOLEO_GROUP = 16  # images; DINOv3 report, section 3.1
# fastest of 512..16384 on CPU for 65,536 prototypes; memory is rows * 4096
PROTOTYPES_AT_ONCE = 4096
# Kept for the backward pass in bf16, counted by saved-tensor hooks over a forward pass with flash attention:
# both norms' inputs and outputs, queries, keys and values, what attention gives and its copy, both layer scales' inputs
BLOCK_BYTES = 22  # per token, channel and transformer block
FFN_BYTES = {
    "mlp": 4,
    "swiglu": 8,
}  # per token and hidden unit: two tensors; gate, its SiLU, up, product
NORM_BYTES = 8  # per token and norm: mean and inverse deviation, fp32
LOGSUMEXP_BYTES = 4  # per token and attention head, fp32
VALUE_BYTES = 2  # of a number in bf16
FP32_BYTES = 4
# Numbers per token at the highest moment of a block without a gradient, in widths and in hidden widths
FORWARD_ATTENTION = 8
FORWARD_FFN = {"mlp": 2, "swiglu": 3}
ROPE_BASE = 100.0  # of the published networks
VIT_NORM_EPS = 1e-5


@dataclass(frozen=True)
class ViTSpec:
    """Shape of a vision transformer.

    ``untie_local_norm`` gives the class token of local crops a separate final norm, in training.
    ``key_bias``, ``rope_base`` and ``norm_eps`` differ from the published values only in weights that say so.
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
    key_bias: bool = False
    rope_base: float = ROPE_BASE
    norm_eps: float = VIT_NORM_EPS

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
        if self.key_bias and not self.qv_bias:
            raise ValueError(f"{self}: a key bias needs a query and a value bias")

    @property
    def unpublished(self) -> Mapping[str, tuple[float, float]]:
        """Numbers that are not those of the published networks, by name: its value, and theirs."""
        values = {
            "RoPE base": (self.rope_base, ROPE_BASE),
            "norm epsilon": (self.norm_eps, VIT_NORM_EPS),
            "key bias": (float(self.key_bias), 0.0),
        }
        return {name: pair for name, pair in values.items() if pair[0] != pair[1]}

    @property
    def probe_call(self) -> str:
        """Python that makes the spec of a network from outside (``students.custom``); empty for a network of ours."""
        return ""

    @property
    def stride(self) -> int:
        """Pixels per patch side."""
        return self.patch

    @property
    def parameters(self) -> int:
        """Number of parameters; a k bias that is always zero is none."""
        width, hidden = self.width, self.ffn_width
        tokens = (2 + self.registers) * width
        patches = (self.in_channels * self.patch**2 + 1) * width
        norms = 2 * width * (2 if self.untie_local_norm else 1)
        attention = 4 * width**2 + (1 + 2 * self.qv_bias + self.key_bias) * width
        matrices = 3 if self.ffn == "swiglu" else 2
        ffn = matrices * width * hidden + (matrices - 1) * hidden + width
        block = 4 * width + attention + 2 * width + ffn  # two norms, two layer scales
        return tokens + patches + norms + self.depth * block

    @property
    def equal_blocks(self) -> int:
        """Number of transformer blocks, which are all of one size."""
        return self.depth

    @property
    def has_batch_norm(self) -> bool:
        """False: its norms are of each token."""
        return False

    @property
    def exported(self) -> "ViTSpec":
        """The same shape without the norm that acts in training only."""
        return replace(self, untie_local_norm=False)

    def tokens(self, size: int) -> int:
        """Number of tokens of one square crop of ``size`` pixels per side."""
        return (size // self.patch) ** 2 + 1 + self.registers

    def flops(self, size: int) -> float:
        """Operations of one forward pass on one crop of ``size`` pixels per side; a multiply-add counts as two."""
        tokens, num_matrices = self.tokens(size), 3 if self.ffn == "swiglu" else 2
        matrices = 4 * self.width**2 + num_matrices * self.width * self.ffn_width
        attention = 4 * tokens**2 * self.width
        blocks = self.depth * (2 * tokens * matrices + attention)
        return float(self.first_layer_flops(size) + blocks)

    def first_layer_flops(self, size: int) -> float:
        """Operations of the patch embedding, whose input needs no gradient."""
        return 2.0 * (size // self.patch) ** 2 * self.in_channels * self.patch**2 * self.width

    def activation_bytes(self, size: int) -> float:
        """Bytes kept for the backward pass of one crop of ``size`` pixels per side, in bf16 with flash attention."""
        per_block = BLOCK_BYTES * self.width + FFN_BYTES[self.ffn] * self.ffn_width
        per_block += 2 * NORM_BYTES + LOGSUMEXP_BYTES * self.heads
        final_norm = VALUE_BYTES * self.width + NORM_BYTES
        pixels = VALUE_BYTES * self.in_channels * size**2
        return float(self.tokens(size) * (self.depth * per_block + final_norm) + pixels)

    def forward_bytes(self, size: int) -> float:
        """Bytes at the highest moment of one forward pass without a gradient, on one crop of ``size`` pixels per side in fp32.

        Attention holds queries, keys and values, the rotated ones and what rotation is computed from; the
        feed-forward part its hidden layer before and after the activation. Weights are not counted.
        """
        hidden = FORWARD_FFN[self.ffn] * self.ffn_width
        per_token = 2 * self.width + max(FORWARD_ATTENTION * self.width, hidden)
        angles = 2 * self.width // self.heads
        pixels = 2 * self.in_channels * size**2
        return float(FP32_BYTES * (self.tokens(size) * (per_token + angles) + pixels))

    def build(self) -> "torch.nn.Module":
        """Build the network; its class and register tokens are uninitialised until ``init_``."""
        from teacher.vit import ViT

        return ViT(self)

    def init_(self, network: "torch.nn.Module", generator: "torch.Generator") -> None:
        """Give ``network`` fresh weights drawn from ``generator``.

        Raises:
            ValueError: the network is no ViT.
        """
        from teacher.vit import ViT, init_vit_

        if not isinstance(network, ViT):
            raise ValueError(f"{type(network).__name__}: this spec initialises a ViT")
        init_vit_(network, generator)


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

    @property
    def activation_bytes(self) -> int:
        """Bytes kept for the backward pass of one row: inputs of the layers, before and after each GELU, and the bottleneck in fp32 and bf16."""
        hidden = 2 * 2 * self.hidden
        return VALUE_BYTES * (self.width + hidden + self.bottleneck) + 4 * self.bottleneck


def scaled_size(size: int, scale: float) -> int:
    """Pixels per side of a crop that a network sees at a part of its size."""
    return round(size * scale)
