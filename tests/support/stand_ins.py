"""Second implementations of other libraries' networks, from their published key names alone, in float64."""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from students.shapes import ConvNeXtSpec
from teacher.shapes import ViTSpec

DTYPE = torch.float64


def _wide(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DTYPE) for name, tensor in weights.items()}


def layer_norm(weights: Mapping[str, Tensor], name: str, tokens: Tensor, eps: float) -> Tensor:
    scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return F.layer_norm(tokens, scale.shape, scale, shift, eps)


def linear(weights: Mapping[str, Tensor], name: str, tokens: Tensor) -> Tensor:
    return tokens @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def conv(
    weights: Mapping[str, Tensor], name: str, image: Tensor, stride: int, groups: int = 1
) -> Tensor:
    kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    padding = kernel.shape[-1] // 2 if stride == 1 else 0
    return F.conv2d(image, kernel, bias, stride, padding, groups=groups)


def meta_vit(stored: Mapping[str, Tensor], spec: ViTSpec, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Meta's ViT on its own names; what it multiplies a bias by is the mask in the file, if there is one."""
    weights, pixels = _wide(stored), pixels.to(DTYPE)
    patches = conv(weights, "patch_embed.proj", pixels, spec.patch)
    high, wide = patches.shape[2:]
    prefix = [weights[name] for name in ("cls_token", "storage_tokens")]
    tokens = torch.cat(
        [*(each.expand(len(pixels), -1, -1) for each in prefix), patches.flatten(2).mT], dim=1
    )
    periods = weights["rope_embed.periods"]
    angles = torch.tensor(
        [
            [
                2 * math.pi * (2 * (at + 0.5) / count - 1)
                for at, count in ((row, high), (column, wide))
            ]
            for row in range(high)
            for column in range(wide)
        ],
        dtype=DTYPE,
    )
    angles = (angles[:, :, None] / periods).flatten(1).tile(2)  # [patches, head_dim]

    def turn(heads: Tensor) -> Tensor:
        kept, moved = heads.split([heads.shape[2] - high * wide, high * wide], dim=2)
        half = moved.shape[-1] // 2
        turned = torch.cat([-moved[..., half:], moved[..., :half]], dim=-1)
        return torch.cat([kept, moved * angles.cos() + turned * angles.sin()], dim=2)

    for block in range(spec.depth):
        own = {
            name.removeprefix(f"blocks.{block}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"blocks.{block}.")
        }
        bias = own.get("attn.qkv.bias", torch.zeros(3 * spec.width, dtype=DTYPE))
        bias = bias * own.get("attn.qkv.bias_mask", torch.ones_like(bias))
        mixed = layer_norm(own, "norm1", tokens, 1e-5) @ own["attn.qkv.weight"].T + bias
        query, key, value = mixed.unflatten(2, (3, spec.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (turn(query) @ turn(key).mT / query.shape[-1] ** 0.5).softmax(-1)
        attended = (scores @ value).transpose(1, 2).flatten(2)
        tokens = tokens + own["ls1.gamma"] * linear(own, "attn.proj", attended)
        normed = layer_norm(own, "norm2", tokens, 1e-5)
        if spec.ffn == "swiglu":
            hidden = F.silu(linear(own, "mlp.w1", normed)) * linear(own, "mlp.w2", normed)
            tokens = tokens + own["ls2.gamma"] * linear(own, "mlp.w3", hidden)
        else:
            hidden = F.gelu(linear(own, "mlp.fc1", normed))
            tokens = tokens + own["ls2.gamma"] * linear(own, "mlp.fc2", hidden)
    tokens = layer_norm(weights, "norm", tokens, 1e-5)
    return tokens[:, 0], tokens[:, 1 + spec.registers :]


def meta_convnext(
    stored: Mapping[str, Tensor], spec: ConvNeXtSpec, pixels: Tensor
) -> tuple[Tensor, Tensor]:
    """Meta's ConvNeXt on its own names."""
    weights, pixels = _wide(stored), pixels.to(DTYPE)

    def norm_channels(name: str, image: Tensor) -> Tensor:
        return layer_norm(weights, name, image.movedim(1, -1), 1e-6).movedim(-1, 1)

    image = pixels
    for stage, depth in enumerate(spec.depths):
        step = f"downsample_layers.{stage}"
        if stage == 0:
            image = norm_channels(f"{step}.1", conv(weights, f"{step}.0", image, 4))
        else:
            image = conv(weights, f"{step}.1", norm_channels(f"{step}.0", image), 2)
        for block in range(depth):
            at = f"stages.{stage}.{block}"
            mixed = conv(weights, f"{at}.dwconv", image, 1, groups=image.shape[1])
            inner = layer_norm(weights, f"{at}.norm", mixed.movedim(1, -1), 1e-6)
            inner = linear(
                weights, f"{at}.pwconv2", F.gelu(linear(weights, f"{at}.pwconv1", inner))
            )
            image = image + (weights[f"{at}.gamma"] * inner).movedim(-1, 1)
    last = f"norms.{len(spec.depths) - 1}.weight"
    assert torch.equal(weights["norm.weight"], weights.get(last, weights["norm.weight"]))
    patches = image.flatten(2).mT
    tokens = torch.cat([patches.mean(1, keepdim=True), patches], dim=1)
    tokens = layer_norm(weights, "norm", tokens, 1e-6)
    return tokens[:, 0], tokens[:, 1:]


TIMM_NAMES = {  # of a ViT: timm's, Meta's
    r"reg_token": "storage_tokens",
    r"gamma_([12])": r"ls\1.gamma",
    r"mlp\.fc1_g\.": "mlp.w1.",
    r"mlp\.fc1_x\.": "mlp.w2.",
}
TIMM_CONVNEXT_NAMES = {
    r"^stem\.": "downsample_layers.0.",
    r"^stages\.(\d+)\.downsample\.": r"downsample_layers.\1.",
    r"\.blocks\.": ".",
    r"\.conv_dw\.": ".dwconv.",
    r"\.mlp\.fc([12])\.": r".pwconv\1.",
    r"^head\.norm\.": "norm.",
}


def timm_vit(
    stored: Mapping[str, Tensor], spec: ViTSpec, pixels: Tensor, base: float = 100.0
) -> tuple[Tensor, Tensor]:
    """timm's ViT on its own names: no key bias, and RoPE of a base that no file holds."""
    names = {**TIMM_NAMES, r"mlp\.fc2\.": "mlp.w3."} if spec.ffn == "swiglu" else TIMM_NAMES
    weights = _renamed(stored, names)
    for block in range(spec.depth):
        at = f"blocks.{block}.attn"
        if f"{at}.q_bias" in weights:
            query, value = weights.pop(f"{at}.q_bias"), weights.pop(f"{at}.v_bias")
            weights[f"{at}.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    head_dim = spec.width // spec.heads
    steps = torch.arange(head_dim // 4, dtype=DTYPE)
    weights["rope_embed.periods"] = base ** (2 * steps / (head_dim / 2))
    return meta_vit(weights, spec, pixels)


def timm_convnext(
    stored: Mapping[str, Tensor], spec: ConvNeXtSpec, pixels: Tensor
) -> tuple[Tensor, Tensor]:
    """timm's ConvNeXt on its own names."""
    return meta_convnext(_renamed(stored, TIMM_CONVNEXT_NAMES), spec, pixels)


def _renamed(weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in weights.items():
        other = name
        for pattern, theirs in names.items():
            other = re.sub(pattern, theirs, other)
        found[other] = tensor
    return found
