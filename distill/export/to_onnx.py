"""ONNX: model.onnx with free batch, height and width, read by onnxruntime."""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill.export.exporter import Exporter, Forward
from distill.export.onnx import require_exporter, write_onnx
from distill.runfolder.files import replaced
from distill.weights.load import load_backbone
from students.shapes import BackboneSpec

FILE = "model.onnx"


def _write(name: str, source: Path, folder: Path, dtype: torch.dtype) -> None:  # noqa: ARG001  # the folder has it
    folder.mkdir()
    backbone, spec = load_backbone(source)
    write_onnx(backbone, spec, folder / FILE, dtype=dtype)


def _read_back(folder: Path, stride: int) -> Forward:  # noqa: ARG001  # the graph names its outputs
    """``model.onnx`` in onnxruntime on the CPU."""
    session = importlib.import_module("onnxruntime").InferenceSession(
        folder / FILE, providers=["CPUExecutionProvider"]
    )

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = session.run(["class_token", "patch_tokens"], {"pixel_values": pixels.numpy()})
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])

    return forward


def _usage(name: str, spec: BackboneSpec, files: Sequence[str]) -> list[str]:  # noqa: ARG001  # the code has the folder
    return [
        "import onnxruntime",
        "",
        'session = onnxruntime.InferenceSession(f"{folder}/model.onnx")',
        "class_feature, patch_features = session.run(",
        '    ["class_token", "patch_tokens"], {"pixel_values": pixels.numpy()}',
        ")  # pixels: float32, [images, 3, height, width]",
    ]


def attach(folder: Path, licence: Mapping[str, str]) -> None:
    """Writes it into ``metadata_props``, because the file often travels without its folder."""
    onnx = importlib.import_module("onnx")
    for path in sorted(folder.glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        onnx.helper.set_model_props(model, dict(licence))
        with replaced(path) as aside:
            onnx.save(model, aside)


EXPORTER = Exporter(
    "onnx",
    "onnx",
    "onnxruntime",
    _write,
    _read_back,
    _usage,
    require=require_exporter,
    attach=attach,
)
