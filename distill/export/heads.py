"""A backbone and a classifier as files: one ONNX graph, or a Hugging Face folder and ``classifier.safetensors``.

    onnx-KIND   model.onnx: ``pixel_values`` to ``class_token``, ``patch_tokens`` and ``logits``
    hf-KIND     the folder of ``hf``, ``classifier.safetensors``, and the names of the classes in ``config.json``

transformers has no class of DINOv3 with a classifier, so that ``AutoModel`` reads the backbone and a few lines of
torch apply the head; they stand in the card. Class names are in ``metadata_props`` of the graph, too.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from distill.export import to_hf, to_onnx
from distill.export.classifiers import KnnHead, LinearHead
from distill.export.convert import convert
from distill.export.exporter import Exporter, Measured
from distill.export.licences import CONFIG
from distill.export.onnx import write_onnx
from distill.runfolder.files import replace_text, replaced
from distill.weights.containers import read_object
from distill.weights.load import load_backbone
from students.shapes import BackboneSpec

CLASSIFIER = "classifier.safetensors"
FORMS, HEAD_KINDS = ("onnx", "hf"), ("knn", "linear")


@dataclass(frozen=True)
class Classifier:
    """A classifier.

    Args:
        kind: what ``--with-head`` calls it.
        module: takes class tokens [images, width] and patch tokens [images, patches, width] to logits
            [images, classes]; its state is what the files hold.
        class_names: in the order of the logits.
        settings: what it was fitted with, for ``config.json``.
    """

    kind: str
    module: KnnHead | LinearHead
    class_names: tuple[str, ...]
    settings: Mapping[str, Any]

    def to_config(self) -> dict[str, Any]:
        """Keys of ``config.json``."""
        names = {str(index): name for index, name in enumerate(self.class_names)}
        return {
            "id2label": names,
            "label2id": {name: int(index) for index, name in names.items()},
            "classifier": {"kind": self.kind, **self.settings},
        }


def with_head(form: str, head: Classifier, measure: Callable[[Path], Measured]) -> Exporter:
    """The format ``onnx`` or ``hf`` with a classifier; ``measure`` gets the written folder."""
    if form == "onnx":
        base, write, usage = to_onnx.EXPORTER, _write_onnx, _onnx_usage
    else:
        base, write, usage = to_hf.EXPORTER, _write_hf, _hf_usage
    return replace(
        base,
        name=f"{form}-{head.kind}",
        write=partial(write, head),
        usage=partial(usage, head),
        attach=partial(_attach, head) if form == "onnx" else base.attach,
        measure=measure,
    )


def _write_onnx(
    head: Classifier,
    name: str,  # noqa: ARG001  # as every format's
    source: Path,
    folder: Path,
    dtype: torch.dtype,
) -> None:
    folder.mkdir()
    backbone, spec = load_backbone(source)
    write_onnx(backbone, spec, folder / to_onnx.FILE, dtype=dtype, head=head.module.eval())


def _attach(head: Classifier, folder: Path, licence: Mapping[str, str]) -> None:
    to_onnx.attach(folder, {**licence, "id2label": json.dumps(head.to_config()["id2label"])})


def _onnx_usage(head: Classifier, name: str, spec: BackboneSpec, files: Sequence[str]) -> list[str]:  # noqa: ARG001  # the graph has the head
    return [
        "import json",
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession(f"{{folder}}/{to_onnx.FILE}")',
        '(logits,) = session.run(["logits"], {"pixel_values": pixels.numpy()})',
        'names = json.loads(session.get_modelmeta().custom_metadata_map["id2label"])',
        "print(names[str(logits[0].argmax())])",
    ]


def _write_hf(head: Classifier, name: str, source: Path, folder: Path, dtype: torch.dtype) -> None:  # noqa: ARG001  # the folder has it
    convert(source, folder, layout="hf", dtype=dtype)
    config = {**read_object(folder / CONFIG), **head.to_config()}
    replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    tensors = {name: each.contiguous() for name, each in head.module.state_dict().items()}
    with replaced(folder / CLASSIFIER) as aside:
        save_file(tensors, aside, {"format": "pt"})


def _hf_usage(head: Classifier, name: str, spec: BackboneSpec, files: Sequence[str]) -> list[str]:
    features = to_hf.EXPORTER.usage(name, spec, files)
    return [
        "from safetensors.torch import load_file",
        *features,
        f'head = load_file(f"{{folder}}/{CLASSIFIER}")',
        *head.module.usage,
        "print(backbone.config.id2label[int(logits[0].argmax())])",
    ]


def read_logits(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Opens ``model.onnx`` of a folder: pixels [images, channels, height, width] to logits [images, classes].

    Raises:
        ImportError: onnxruntime is not installed.
    """
    session = importlib.import_module("onnxruntime").InferenceSession(
        folder / to_onnx.FILE, providers=["CPUExecutionProvider"]
    )
    return lambda pixels: torch.from_numpy(
        session.run(["logits"], {"pixel_values": pixels.numpy()})[0]
    )
