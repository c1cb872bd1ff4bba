"""The DINOv3 vision transformer: pre-norm blocks, LayerScale, axial RoPE on patch tokens.

Parameter names are the flat names of the published Hugging Face files, so a state dict is a file
and nothing is translated. Token order: class, registers, patches. Source: DINOv3 report, section
3.2 and Table 2.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from teacher.batch import Features, RopeScale
from teacher.drop_path import BRANCHES, ActiveRows
from teacher.init import fill_random_, init_matrix_
from teacher.shapes import ROPE_BASE, ViTSpec

Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Tile:
    """Where pixels lie in a larger image: its patch grid (height, width), and row and column of their first patch."""

    grid_hw: tuple[int, int]
    first: tuple[int, int]


class Embeddings(nn.Module):
    """Pixels to tokens: patch convolution, mask token, class and register tokens in front."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, spec.width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.width))
        self.register_tokens = nn.Parameter(torch.empty(1, spec.registers, spec.width))
        self.patch_embeddings = nn.Conv2d(spec.in_channels, spec.width, spec.patch, spec.patch)

    def forward(
        self,
        pixels: Float[Tensor, "rows channels height width"],
        masks: Bool[Tensor, "rows patches"] | None,
    ) -> Float[Tensor, "rows tokens embed"]:
        patches = self.patch_embeddings(pixels).flatten(2).transpose(1, 2)  # [rows, patches, embed]
        if masks is not None:
            if masks.shape != patches.shape[:2]:
                wanted = list(patches.shape[:2])
                raise ValueError(
                    f"masks of {list(masks.shape)}: must be [rows, patches] = {wanted}"
                )
            patches = torch.where(masks[..., None], self.mask_token.to(patches.dtype), patches)
        rows = patches.shape[0]
        return torch.cat(
            [
                self.cls_token.expand(rows, -1, -1),
                self.register_tokens.expand(rows, -1, -1),
                patches,
            ],
            dim=1,
        )


def rope_angles(
    grid_hw: tuple[int, int],
    head_dim: int,
    scale: float,
    device: torch.device,
    base: float = ROPE_BASE,
    tile: Tile | None = None,
) -> tuple[Float[Tensor, "patches head_dim"], Float[Tensor, "patches head_dim"]]:
    """Makes the sine and cosine of each patch's axial rotary position, row-major, in fp32.

    Coordinates are patch centres scaled to [-1, 1] on each axis; head dimension D has D/4 periods
    ``base ** (2 i / (D / 2))``. The angles of the row and of the column are concatenated and repeated
    once, and rotation pairs the first half of a head with the second. ``scale`` stretches the box
    [-1, 1]; it is 1 outside training. ``tile``: the grid is a part of this image, and has the coordinates
    of these patches there.

    Source: DINOv3 report, section 3.2 (RoPE and box jittering).
    """
    tile = tile or Tile(grid_hw, (0, 0))
    rows, columns = (
        (
            (torch.arange(first, first + count, dtype=torch.float32, device=device) + 0.5)
            / total
            * 2.0
            - 1.0
        )
        * scale
        for first, count, total in zip(tile.first, grid_hw, tile.grid_hw, strict=True)
    )
    exponents = torch.arange(head_dim // 4, dtype=torch.float32, device=device) * (4.0 / head_dim)
    periods = base**exponents
    coordinates = torch.cartesian_prod(rows, columns)  # [patches, 2]
    angles = 2.0 * math.pi * coordinates[:, :, None] / periods  # [patches, 2, head_dim / 4]
    angles = angles.flatten(1).repeat(1, 2)  # [patches, head_dim]
    return angles.sin(), angles.cos()


def rotate(
    heads: Float[Tensor, "rows heads tokens head_dim"],
    sine: Float[Tensor, "patches head_dim"],
    cosine: Float[Tensor, "patches head_dim"],
) -> Float[Tensor, "rows heads tokens head_dim"]:
    """Queries or keys with their last ``patches`` tokens rotated; those before pass unchanged.

    Computed in fp32, returned in the dtype that came in.
    """
    num_prefix = heads.shape[2] - sine.shape[0]
    prefix, patches = heads[:, :, :num_prefix], heads[:, :, num_prefix:].float()
    first, second = patches.chunk(2, dim=-1)
    turned = patches * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([prefix, turned.to(heads.dtype)], dim=2)


class Attention(nn.Module):
    """Multi-head self-attention; keys have a bias only where weights from elsewhere have one."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.num_heads = spec.heads
        self.q_proj = nn.Linear(spec.width, spec.width, bias=spec.qv_bias)
        self.k_proj = nn.Linear(spec.width, spec.width, bias=spec.key_bias)
        self.v_proj = nn.Linear(spec.width, spec.width, bias=spec.qv_bias)
        self.o_proj = nn.Linear(spec.width, spec.width)

    def forward(
        self, tokens: Float[Tensor, "rows tokens embed"], angles: Angles
    ) -> Float[Tensor, "rows tokens embed"]:
        query, key, value = (
            projection(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [rows, heads, tokens, head_dim]
        attended = F.scaled_dot_product_attention(
            rotate(query, *angles), rotate(key, *angles), value
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with GELU."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.up_proj = nn.Linear(spec.width, spec.ffn_width)
        self.down_proj = nn.Linear(spec.ffn_width, spec.width)

    def forward(
        self, tokens: Float[Tensor, "rows tokens embed"]
    ) -> Float[Tensor, "rows tokens embed"]:
        return self.down_proj(F.gelu(self.up_proj(tokens)))


class SwiGLU(nn.Module):
    """Gated feed-forward: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.width, spec.ffn_width)
        self.up_proj = nn.Linear(spec.width, spec.ffn_width)
        self.down_proj = nn.Linear(spec.ffn_width, spec.width)

    def forward(
        self, tokens: Float[Tensor, "rows tokens embed"]
    ) -> Float[Tensor, "rows tokens embed"]:
        return self.down_proj(F.silu(self.gate_proj(tokens)) * self.up_proj(tokens))


class LayerScale(nn.Module):
    """One learned factor per channel."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((spec.width,), spec.layerscale_init))

    def forward(
        self, tokens: Float[Tensor, "rows tokens embed"]
    ) -> Float[Tensor, "rows tokens embed"]:
        return tokens * self.lambda1


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and scaled after."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.attention = Attention(spec)
        self.layer_scale1 = LayerScale(spec)
        self.norm2 = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[spec.ffn](spec)
        self.layer_scale2 = LayerScale(spec)

    def forward(
        self,
        tokens: Float[Tensor, "rows tokens embed"],
        angles: Angles,
        active_rows: ActiveRows | None = None,
        index: int = 0,
    ) -> Float[Tensor, "rows tokens embed"]:
        """``active_rows`` are the rows that pass through the branches of block ``index``; all without it."""

        def attend(rows: Tensor) -> Tensor:
            return self.layer_scale1(self.attention(self.norm1(rows), angles))

        def transform(rows: Tensor) -> Tensor:
            return self.layer_scale2(self.mlp(self.norm2(rows)))

        if active_rows is None:
            tokens = tokens + attend(tokens)
            return tokens + transform(tokens)
        tokens = active_rows.add(tokens, attend, BRANCHES * index)
        return active_rows.add(tokens, transform, BRANCHES * index + 1)


class ViT(nn.Module):
    """A vision transformer that satisfies ``teacher.batch.Backbone``.

    ``checkpoint_activations``: in training each block keeps its input only and is computed again for the
    backward pass.
    """

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        self._is_checkpointing = False
        self.spec, self.width, self.stride = spec, spec.width, spec.patch
        self.embeddings = Embeddings(spec)
        self.layer = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.width, eps=spec.norm_eps)
        if spec.untie_local_norm:
            self.local_cls_norm = nn.LayerNorm(spec.width, eps=spec.norm_eps)

    def checkpoint_activations(self) -> None:
        """From now on each block keeps its input only, and is computed again for the backward pass."""
        self._is_checkpointing = True

    def tokens(
        self,
        pixels: Float[Tensor, "rows channels height width"],
        masks: Bool[Tensor, "rows patches"] | None = None,
        *,
        rope_scale: RopeScale = 1.0,
    ) -> Float[Tensor, "rows tokens embed"]:
        """All tokens after the final norm: class, registers, patches.

        Raises:
            ValueError: as ``forward``.
        """
        return self.norm(self._run_blocks(pixels, masks, rope_scale))

    def forward(
        self,
        pixels: Float[Tensor, "rows channels height width"],
        masks: Bool[Tensor, "rows patches"] | None = None,
        *,
        rope_scale: RopeScale = 1.0,
        is_local: bool = False,
        active_rows: ActiveRows | None = None,
        tile: Tile | None = None,
    ) -> Features:
        """Normalised class and patch tokens; masked patches are replaced by the mask token.

        ``rope_scale``: of all blocks, or of each. ``is_local`` uses the separate class norm of local crops where the network has one. ``active_rows``
        are the rows that pass through each residual branch (stochastic depth); all without it. ``tile``:
        where the pixels lie in a larger image, whose coordinates they then have.

        Raises:
            ValueError: a side is not a multiple of the patch, or the masks do not fit the grid.
        """
        tokens = self._run_blocks(pixels, masks, rope_scale, active_rows, tile)
        normed = self.norm(tokens)
        class_token = normed[:, 0]
        if is_local and self.spec.untie_local_norm:
            class_token = self.local_cls_norm(tokens[:, 0])
        return Features(
            class_token=class_token,
            patch_tokens=normed[:, 1 + self.spec.registers :],
            grid_hw=self._grid_hw(pixels),
        )

    def _grid_hw(self, pixels: Tensor) -> tuple[int, int]:
        height, width = pixels.shape[2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"crop of {height} x {width} px: "
                f"sides must be multiples of the patch, {self.stride}"
            )
        return height // self.stride, width // self.stride

    def _run_blocks(
        self,
        pixels: Tensor,
        masks: Tensor | None,
        rope_scale: RopeScale,
        active_rows: ActiveRows | None = None,
        tile: Tile | None = None,
    ) -> Tensor:
        head_dim = self.spec.width // self.spec.heads
        grid_hw, base = self._grid_hw(pixels), self.spec.rope_base
        is_each = isinstance(rope_scale, tuple)
        scales = rope_scale if isinstance(rope_scale, tuple) else (rope_scale,)
        angles = [
            rope_angles(grid_hw, head_dim, scale, pixels.device, base, tile)
            for scale in scales[: len(self.layer)]
        ]
        tokens = self.embeddings(pixels, masks)
        keeps_less = self._is_checkpointing and tokens.requires_grad
        for index, block in enumerate(self.layer):
            inputs = (tokens, angles[index if is_each else 0], active_rows, index)
            if keeps_less:  # no comparison of shapes: ZeRO-3 empties weights between the passes
                tokens = checkpoint(
                    block,
                    *inputs,
                    use_reentrant=False,
                    determinism_check="none",
                    preserve_rng_state=False,
                )
            else:
                tokens = block(*inputs)
        return tokens


def init_vit_(vit: ViT, generator: torch.Generator) -> None:
    """Fresh weights: linear and convolution layers truncated normal 0.02, biases zero.

    Class and register tokens are normal 0.02, the mask token zero, LayerScale at its initial value.
    """
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            init_matrix_(module, generator)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.lambda1, vit.spec.layerscale_init)
    for token in (vit.embeddings.cls_token, vit.embeddings.register_tokens):
        fill_random_(token, nn.init.normal_, 0.02, generator)
    nn.init.zeros_(vit.embeddings.mask_token)
