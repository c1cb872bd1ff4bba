"""Folders of networks; what a run writes in the end stands in tests/test_parked.py and tests/test_journeys.py."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from distill.job import write_networks
from distill.job.prepare import Job
from distill.job.write_networks import write_students
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_recipe
from distill.train.phase import Phase


def test_write_students__one_without_a_step_has_no_folder_and_loses_an_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(Path(__file__).parents[3] / "recipes/quickstart.yaml")
    assert isinstance(recipe, FamilyRecipe)
    name = recipe.students[0].label
    old = tmp_path / "students" / name / "model.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of an earlier student")
    (tmp_path / "licences").mkdir()
    monkeypatch.setattr(write_networks, "count_images_of", lambda job, which: 8)
    monkeypatch.setattr(write_networks.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(write_networks.dist, "barrier", lambda: None)
    trainer = SimpleNamespace(
        name=name,
        placement=SimpleNamespace(first_rank=0),
        ema=lambda *, collect: {"backbone.norm.weight": torch.ones(4)},
        steps_applied=lambda: 0,
    )
    job, phase = Mock(spec=Job, run_folder=tmp_path), Mock(spec=Phase, trainers=[trainer])
    write_students(job, recipe, phase, recipe.students[0].backbone_spec(), "fingerprint")
    assert not old.parent.exists()
