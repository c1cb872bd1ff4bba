"""A checkpoint with the EMA of some networks, as a run saves it."""

from pathlib import Path

import torch

from distill.recipe.keys import FamilyRecipe
from distill.runfolder.files import make_folder, write_file
from distill.runfolder.manifest import (
    FORMAT_VERSION,
    Manifest,
    collect,
    commit,
    next_number,
    record_done,
    staging_folder,
)
from distill.runfolder.tensor_file import encode


def fresh_weights(recipe: FamilyRecipe, step: int) -> dict[str, dict[str, torch.Tensor]]:
    """Backbones of a recipe's students by name, others at every step."""
    weights = {}
    for turn, student in enumerate(recipe.students):
        spec = student.backbone_spec()
        backbone = spec.build()
        spec.init_(backbone, torch.Generator().manual_seed(step + turn))
        weights[student.label] = dict(backbone.state_dict())
    return weights


def save_checkpoint(
    folder: Path,
    step: int,
    weights: dict[str, dict[str, torch.Tensor]],
    *,
    is_milestone: bool = False,
) -> None:
    """Saves ``weights``, backbones by name, as those after ``step`` steps of the family."""
    staging = staging_folder(folder, "family", step)
    make_folder(staging)
    for name, tensors in weights.items():
        stored = {f"ema/backbone.{key}": tensor for key, tensor in tensors.items()}
        file = staging / f"{name}.safetensors"
        record_done(file, write_file(file, encode({**stored, "online/x": torch.zeros(1)})))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        number=next_number(folder),
        phase="family",
        step=step,
        num_ranks=1,
        is_milestone=is_milestone,
        recipe_hash="hash",
        networks={},
        files=collect(staging, {f"{name}.safetensors": 0 for name in weights}, 1.0, {}),
    )
    commit(folder, staging, manifest, 9)
