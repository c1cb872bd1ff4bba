"""Meta's code: NAME-<8 hex digits of its sha256>.pth, as the published files are named."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.export.convert import convert
from distill.export.exporter import Exporter, Forward
from distill.export.save import sha256_of
from distill.runfolder.files import rename
from distill.weights.load import load_backbone
from students.shapes import CATALOG, BackboneSpec, ConvNeXtSpec
from teacher.shapes import ViTSpec

SWIGLU_SHARE = 2 / 3  # Meta's ffn_ratio counts the width before a gated layer is cut to two thirds


def _write(name: str, source: Path, folder: Path, dtype: torch.dtype) -> None:
    folder.mkdir()
    file = folder / f"{name}.pth"
    convert(source, file, layout="meta", dtype=dtype)
    rename(file, folder / f"{name}-{sha256_of(file)[:8]}.pth")


def _read_back(folder: Path, stride: int) -> Forward:  # noqa: ARG001  # our features are named
    """The ``.pth`` file read back by us: finds a damaged file, not a key that both ways get wrong."""
    (file,) = folder.glob("*.pth")
    backbone = load_backbone(file)[0].eval()

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = backbone(pixels)
        return found.class_token, found.patch_tokens

    return forward


def _usage(name: str, spec: BackboneSpec, files: Sequence[str]) -> list[str]:  # noqa: ARG001  # the code has the folder
    """Meta's hub entry for a published size, its classes for any other."""
    (weights,) = (file for file in files if file.endswith(".pth"))
    path = f"{{folder}}/{weights}"
    published = [arch for arch, known in CATALOG.items() if known == spec]
    if published:
        entry = f'"facebookresearch/dinov3", "dinov3_{published[0]}"'
        return [
            f'backbone = torch.hub.load({entry}, weights=f"{path}")',
        ]
    assert type(spec) in _META_CODE, f"a {type(spec).__name__} is not written for Meta's code"
    module, class_, arguments = _META_CODE[type(spec)](spec)
    return [
        f"from dinov3.models.{module} import {class_}",
        "",
        f"backbone = {class_}(",
        *(f"    {line}" for line in arguments),
        ")",
        f'backbone.load_state_dict(torch.load(f"{path}", weights_only=True))',
    ]


def _meta_vit(spec: ViTSpec) -> tuple[str, str, list[str]]:
    is_gated = spec.ffn == "swiglu"
    ratio = spec.ffn_width / spec.width / (SWIGLU_SHARE if is_gated else 1.0)
    arguments = [
        f"patch_size={spec.patch}, embed_dim={spec.width}, depth={spec.depth}, num_heads={spec.heads},",
        f'ffn_ratio={ratio:g}, ffn_layer="{"swiglu" if is_gated else "mlp"}", qkv_bias={spec.qv_bias},',
        f'n_storage_tokens={spec.registers}, norm_layer="layernormbf16", layerscale_init=1.0,',
        f'mask_k_bias=True, pos_embed_rope_base={spec.rope_base:g}, pos_embed_rope_dtype="fp32",',
    ]
    return "vision_transformer", "DinoVisionTransformer", arguments


def _meta_convnext(spec: ConvNeXtSpec) -> tuple[str, str, list[str]]:
    return "convnext", "ConvNeXt", [f"depths={list(spec.depths)}, dims={list(spec.widths)},"]


# type of spec -> module, class and arguments in Meta's code
_META_CODE: Mapping[type, Callable[[Any], tuple[str, str, list[str]]]] = {
    ViTSpec: _meta_vit,
    ConvNeXtSpec: _meta_convnext,
}


EXPORTER = Exporter("meta", "dinov3", None, _write, _read_back, _usage)
