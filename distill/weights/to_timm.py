"""timm: config.json and model.safetensors in timm's layout."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill.weights.convert import convert
from distill.weights.exporter import Exporter, Forward
from students.shapes import BackboneSpec


def _write(name: str, source: Path, folder: Path, dtype: torch.dtype) -> None:  # noqa: ARG001  # the folder has it
    convert(source, folder, layout="timm", dtype=dtype)


def _read_back(folder: Path, stride: int) -> Forward:
    """``create_model`` on the folder; a ConvNeXt of timm norms its map only behind the pooling."""
    backbone = importlib.import_module("timm").create_model(f"local-dir:{folder}", pretrained=True)
    backbone.eval()

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = backbone.forward_features(pixels)
        if found.ndim == 4:  # [images, width, rows, columns]
            return backbone(pixels), backbone.head.norm(found).flatten(2).transpose(1, 2)
        num_patches = (pixels.shape[2] // stride) * (pixels.shape[3] // stride)
        return backbone(pixels), found[:, -num_patches:]

    return forward


def _usage(name: str, spec: BackboneSpec, files: Sequence[str]) -> list[str]:  # noqa: ARG001  # of no importance here
    return [
        "import timm",
        "",
        f'backbone = timm.create_model("local-dir:{name}", pretrained=True).eval()',
    ]


EXPORTER = Exporter("timm", "timm", "timm", _write, _read_back, _usage, reader_part="create_model")
