"""Folders of students as a finished run leaves them."""

from pathlib import Path

import torch

from distill.export.card import Background, Inputs
from distill.export.licences import Licences
from distill.export.save import ExportFacts, write_backbone
from students.shapes import BackboneSpec, ConvNeXtSpec
from teacher.shapes import ViTSpec

VIT = ViTSpec(width=32, depth=2, heads=2, ffn_width=64, patch=8, layerscale_init=0.5)


GATED = ViTSpec(
    width=24, depth=2, heads=2, ffn_width=48, patch=8, ffn="swiglu", layerscale_init=0.5
)


CONVNEXT = ConvNeXtSpec((1, 1, 2, 1), (8, 12, 16, 20), layerscale_init=0.5)


INPUTS = Inputs(64, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


BACKGROUND = Background(
    record={
        "method": "distillation",
        "recipe": "family",
        "recipe_hash": "feed",
        "steps": 7,
        "data": "34cd",
        "images": 766,
        "sources": ["photographs"],
        "teacher": {"name": "big", "arch": "vitl16", "parameters": 303},
        "teacher_fingerprint": "12ab",
    },
    licences=Licences(),
    scores={
        "teacher": {"knn": 0.9},
        "students": {"small": {"knn": 0.8}},
        "baselines": {"pixels": 0.3, "colour": 0.6, "untrained": {"small": 0.5}},
    },
)


def write_network(folder: Path, spec: BackboneSpec, seed: int = 0) -> Path:
    """A student's folder in which no tensor is special: biases, norms and scales are random as well."""
    generator = torch.Generator().manual_seed(seed)
    weights = spec.build().state_dict()
    for name, tensor in weights.items():
        is_factor = tensor.ndim == 1 and name.endswith(("weight", "lambda1", "gamma"))
        is_matrix = tensor.ndim > 1 and name.endswith("weight")
        spread = tensor[0].numel() ** -0.5 if is_matrix else 0.2
        noise = spread * torch.randn(tensor.shape, generator=generator)
        weights[name] = 1.0 + noise if is_factor else noise
    facts = ExportFacts(64, INPUTS.mean, INPUTS.std, dict(BACKGROUND.record))
    write_backbone(folder, weights, spec, facts)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
