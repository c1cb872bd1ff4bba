"""Names of the same tensors in three published layouts, and how each is made from another.

Our layout is the Hugging Face flat one (``hf``): it is what networks are built with. ``meta`` are the
keys of the released ``.pth`` files, ``timm`` those of its ``_qkvb`` models. A translation is a table:
for every tensor of the target, which tensors of the source it needs and what is done with them; so a
reader can go tensor by tensor.

What the layouts do not share: Meta fuses q, k and v, multiplies their biases by a mask that is
zero for keys (done on reading, ``distill.weights.stored_values``), stores RoPE periods, and holds the
final norm of a ConvNeXt twice; timm has no mask token. Source: key lists of the three libraries; facts
only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from students.shapes import BackboneSpec, ConvNeXtSpec
from teacher.shapes import ROPE_BASE, ViTSpec

Layout = Literal["hf", "meta", "timm"]


@dataclass(frozen=True)
class Origin:
    """How one tensor is made: from which tensors of the source, by what function of them."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor]


Table = dict[str, Origin]


def _same(name: str) -> Origin:
    return Origin((name,), lambda tensor: tensor)


def origins(spec: BackboneSpec, source: Layout, target: Layout) -> Table:
    """Every tensor of ``target``, in file order, and its origin in ``source``."""
    if source == target:
        return {name: _same(name) for name in names(spec, target)}
    if source == "hf":
        return _from_hf(spec, target)
    if target == "hf":
        return _to_hf(spec, source)
    middle = _to_hf(spec, source)
    return {name: _through(outer, middle) for name, outer in _from_hf(spec, target).items()}


def _through(outer: Origin, middle: Table) -> Origin:
    """An origin whose sources have origins in turn."""
    inner = [middle[name] for name in outer.sources]

    def make(*tensors: Tensor) -> Tensor:
        left = list(tensors)
        parts = []
        for origin in inner:
            count = len(origin.sources)
            parts.append(origin.make(*left[:count]))
            left = left[count:]
        return outer.make(*parts)

    return Origin(tuple(name for origin in inner for name in origin.sources), make)


def names(spec: BackboneSpec, layout: Layout) -> tuple[str, ...]:
    """Names of all tensors of a network in one layout."""
    if layout != "hf":
        return tuple(_from_hf(spec, layout))
    with torch.device("meta"):
        keys = spec.exported.build().state_dict().keys()
    return tuple(keys)


def shapes(spec: BackboneSpec, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a network in one layout; nothing is allocated."""
    with torch.device("meta"):
        ours = spec.exported.build().state_dict()
        return {
            name: tuple(origin.make(*(ours[part] for part in origin.sources)).shape)
            for name, origin in origins(spec, "hf", layout).items()
        }


# ViT


def _pairs(prefix: str, other: str, *, has_bias: bool = True) -> list[tuple[str, str]]:
    kinds = ("weight", "bias") if has_bias else ("weight",)
    return [(f"{prefix}.{kind}", f"{other}.{kind}") for kind in kinds]


def renamed_vit(spec: ViTSpec, layout: Layout) -> list[tuple[str, str]]:
    """(hf name, other name) of the tensors that only have another name."""
    is_meta = layout == "meta"
    pairs = [
        ("embeddings.cls_token", "cls_token"),
        ("embeddings.register_tokens", "storage_tokens" if is_meta else "reg_token"),
        *_pairs("embeddings.patch_embeddings", "patch_embed.proj"),
        *_pairs("norm", "norm"),
    ]
    if spec.ffn == "swiglu":
        theirs = ("w1", "w2", "w3") if is_meta else ("fc1_g", "fc1_x", "fc2")
        layers = list(zip(("gate_proj", "up_proj", "down_proj"), theirs, strict=True))
    else:
        layers = [("up_proj", "fc1"), ("down_proj", "fc2")]
    for block in range(spec.depth):
        ours, other = f"layer.{block}", f"blocks.{block}"
        pairs += _pairs(f"{ours}.norm1", f"{other}.norm1") + _pairs(
            f"{ours}.norm2", f"{other}.norm2"
        )
        pairs += _pairs(f"{ours}.attention.o_proj", f"{other}.attn.proj")
        for branch in (1, 2):
            gamma = f"ls{branch}.gamma" if is_meta else f"gamma_{branch}"
            pairs.append((f"{ours}.layer_scale{branch}.lambda1", f"{other}.{gamma}"))
        for mine, theirs_ in layers:
            pairs += _pairs(f"{ours}.mlp.{mine}", f"{other}.mlp.{theirs_}")
    return pairs


def _vit_from_hf(spec: ViTSpec, layout: Layout) -> Table:
    table = {other: _same(ours) for ours, other in renamed_vit(spec, layout)}
    if layout == "meta":
        table["mask_token"] = Origin(("embeddings.mask_token",), lambda token: token[0])
        head_dim = spec.width // spec.heads
        table["rope_embed.periods"] = Origin((), lambda: rope_periods(head_dim, spec.rope_base))
    for block in range(spec.depth):
        ours, other = f"layer.{block}.attention", f"blocks.{block}.attn"
        weights = tuple(f"{ours}.{part}_proj.weight" for part in "qkv")
        table[f"{other}.qkv.weight"] = Origin(weights, lambda *parts: torch.cat(parts))
        if not spec.qv_bias:
            continue
        query, value = f"{ours}.q_proj.bias", f"{ours}.v_proj.bias"
        if spec.key_bias and layout == "meta":
            biases = tuple(f"{ours}.{part}_proj.bias" for part in "qkv")
            table[f"{other}.qkv.bias"] = Origin(biases, lambda *parts: torch.cat(parts))
            table[f"{other}.qkv.bias_mask"] = Origin(
                biases, lambda *p: torch.cat(p).new_ones(3 * spec.width)
            )
        elif layout == "meta":
            table[f"{other}.qkv.bias"] = Origin(
                (query, value), lambda q, v: torch.cat([q, torch.zeros_like(q), v])
            )
            table[f"{other}.qkv.bias_mask"] = Origin(
                (query,),
                lambda q: torch.cat([torch.ones_like(q), q.new_zeros(len(q)), torch.ones_like(q)]),
            )
        else:
            table[f"{other}.q_bias"], table[f"{other}.v_bias"] = _same(query), _same(value)
    return table


def _vit_to_hf(spec: ViTSpec, layout: Layout) -> Table:
    table = {ours: _same(other) for ours, other in renamed_vit(spec, layout)}
    mask, width = "embeddings.mask_token", spec.width
    if layout == "meta":
        table[mask] = Origin(("mask_token",), lambda token: token.view(1, 1, -1))
    else:
        table[mask] = Origin((), lambda: torch.zeros(1, 1, width))
    for block in range(spec.depth):
        ours, other = f"layer.{block}.attention", f"blocks.{block}.attn"
        for third, part in enumerate("qkv"):
            table[f"{ours}.{part}_proj.weight"] = Origin((f"{other}.qkv.weight",), _third(third))
        if not spec.qv_bias:
            continue
        for third, part in enumerate("qkv"):
            if part == "k" and not spec.key_bias:
                continue
            fused = Origin((f"{other}.qkv.bias",), _third(third))
            table[f"{ours}.{part}_proj.bias"] = (
                fused if layout == "meta" else _same(f"{other}.{part}_bias")
            )
    ordered = names(spec, "hf")
    return {name: table[name] for name in ordered}


def _third(index: int) -> Callable[[Tensor], Tensor]:
    return lambda fused: fused.chunk(3)[index]


def rope_periods(head_dim: int, base: float = ROPE_BASE) -> Tensor:
    """Meta's buffer, fp32. The released files hold these numbers rounded to bf16."""
    steps = 2.0 * torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim / 2)
    return torch.tensor(base, dtype=torch.float32) ** steps


# ConvNeXt

_BLOCK_NAMES = {
    "depthwise_conv": ("dwconv", "conv_dw"),
    "layer_norm": ("norm", "norm"),
    "pointwise_conv1": ("pwconv1", "mlp.fc1"),
    "pointwise_conv2": ("pwconv2", "mlp.fc2"),
}


def renamed_convnext(spec: ConvNeXtSpec, layout: Layout) -> list[tuple[str, str]]:
    """(hf name, other name) of all tensors."""
    is_meta = layout == "meta"
    pairs = []
    for stage, depth in enumerate(spec.depths):
        for layer in (0, 1):
            if is_meta:
                other = f"downsample_layers.{stage}.{layer}"
            else:
                other = f"stages.{stage}.downsample.{layer}" if stage else f"stem.{layer}"
            pairs += _pairs(f"stages.{stage}.downsample_layers.{layer}", other)
        for block in range(depth):
            ours = f"stages.{stage}.layers.{block}"
            other = f"stages.{stage}.{block}" if is_meta else f"stages.{stage}.blocks.{block}"
            pairs.append((f"{ours}.gamma", f"{other}.gamma"))
            for mine, theirs in _BLOCK_NAMES.items():
                pairs += _pairs(f"{ours}.{mine}", f"{other}.{theirs[0 if is_meta else 1]}")
    return pairs + _pairs("layer_norm", "norm" if is_meta else "head.norm")


def _convnext_from_hf(spec: ConvNeXtSpec, layout: Layout) -> Table:
    table = {other: _same(ours) for ours, other in renamed_convnext(spec, layout)}
    if layout == "meta":  # the final norm stands twice in the released files
        last = len(spec.depths) - 1
        for kind in ("weight", "bias"):
            table[f"norms.{last}.{kind}"] = _same(f"layer_norm.{kind}")
    return table


def _convnext_to_hf(spec: ConvNeXtSpec, layout: Layout) -> Table:
    table = {ours: _same(other) for ours, other in renamed_convnext(spec, layout)}
    return {name: table[name] for name in names(spec, "hf")}


# type of spec -> from our layout, to our layout
_TRANSLATIONS: Mapping[
    type, tuple[Callable[[Any, Layout], Table], Callable[[Any, Layout], Table]]
] = {
    ViTSpec: (_vit_from_hf, _vit_to_hf),
    ConvNeXtSpec: (_convnext_from_hf, _convnext_to_hf),
}


def _from_hf(spec: BackboneSpec, layout: Layout) -> Table:
    assert type(spec) in _TRANSLATIONS, f"no other library knows a {type(spec).__name__}"
    return _TRANSLATIONS[type(spec)][0](spec, layout)


def _to_hf(spec: BackboneSpec, layout: Layout) -> Table:
    assert type(spec) in _TRANSLATIONS, f"no other library knows a {type(spec).__name__}"
    return _TRANSLATIONS[type(spec)][1](spec, layout)
