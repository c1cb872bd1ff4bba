"""A module with a network of one's own, with BatchNorm, and the folder of a student made by it."""

import json
import sys
from pathlib import Path

import torch

from distill.export.save import ExportFacts, write_backbone
from students.custom import probe
from students.shapes import CustomSpec
from tests.support.exports import BACKGROUND, INPUTS

MODULE = """\
from torch import nn


class Normed(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.width, self.stride = width, 8
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4, bias=False),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.Conv2d(8, width, 2, 2),
            nn.BatchNorm2d(width),
        )

    def forward(self, image):
        patch_map = self.layers(image)
        return patch_map.mean(dim=(2, 3)), patch_map
"""
ARGS = {"width": 16}


def write_module(folder: Path, name: str) -> str:
    """The module ``name`` in a folder, which is made; its factory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(MODULE)
    return f"{name}:Normed"


def write_student(folder: Path, factory: str) -> tuple[Path, CustomSpec]:
    """A student's folder with random weights and running statistics; the factory's module can be imported."""
    spec = probe(factory, json.dumps(ARGS))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: 0.5 + torch.rand(tensor.shape, generator=generator)
        if name.endswith("running_var")
        else torch.randn(tensor.shape, generator=generator) * tensor[0].numel() ** -0.5
        if tensor.is_floating_point()
        else torch.tensor(7)
        for name, tensor in spec.build().state_dict().items()
    }
    facts = ExportFacts(64, INPUTS.mean, INPUTS.std, dict(BACKGROUND.record))
    write_backbone(folder, weights, spec, facts)
    return folder, spec


def forget(factory: str) -> None:
    """Lets the next import of the factory's module look for it anew."""
    sys.modules.pop(factory.partition(":")[0], None)
    probe.cache_clear()
