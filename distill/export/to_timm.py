"""timm: config.json and model.safetensors in timm's layout."""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill.export.convert import convert
from distill.export.exporter import Exporter, Forward
from distill.runfolder.files import replace_text
from distill.weights.containers import read_object
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


def _usage(name: str, spec: BackboneSpec, files: Sequence[str]) -> list[str]:  # noqa: ARG001  # the code has the folder
    return [
        "import timm",
        "",
        'backbone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()',
        "with torch.no_grad():",
        "    class_feature, found = backbone(pixels), backbone.forward_features(pixels)",
    ]


def _name_licence(folder: Path, licence: Mapping[str, str]) -> None:
    """Writes its name into ``pretrained_cfg``, where timm shows it."""
    config = read_object(folder / "config.json")
    name = licence.get("license_name", licence.get("license", "unknown"))
    config["pretrained_cfg"] = {**config["pretrained_cfg"], "license": name}
    replace_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


EXPORTER = Exporter(
    "timm",
    "timm",
    "timm",
    _write,
    _read_back,
    _usage,
    reader_part="create_model",
    attach=_name_licence,
)
