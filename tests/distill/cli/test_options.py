"""A module beside a recipe in another folder is imported with ``--allow-code`` only, by every command."""

import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from distill.errors import UserError
from distill.export.save import ExportFacts, write_backbone
from students.custom import probe
from teacher.shapes import ViTSpec
from tests.support.command import Run
from tests.support.jobs import HEADS, write_images

MODULE = """\
from pathlib import Path
from torch import nn

Path(__file__).with_name("imported").touch()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.stride = 12, 16
        self.conv = nn.Conv2d(3, 12, 16, 16)

    def forward(self, image):
        patch_map = self.conv(image)
        return patch_map.mean((2, 3)), patch_map


def make():
    return Net()
"""
RECIPE = """\
name: mine
teacher: {weights: FOLDER/teacher, heads: fit, fit: {steps: 2, heads: HEADS}}
students:
  - {name: net, arch: "students_here:make", head_widths: {dino_hidden: 16, ibot_hidden: 16}}
data: {sources: [{path: FOLDER/images}]}
crops: {global: {size: 64}, local: {count: 2, size: 32}}
schedule: {batch: 8, steps: 10, lr: {peak: 1.0e-3}}
engine: {device: cpu, processes: 1, precision: fp32}
"""
REFUSED = "students_here:make: No module named 'students_here'; run distill in the folder that holds the module, or pass --allow-code"
STARTED = "ranks would start now"


def start_no_rank(*_: Any, **__: Any) -> NoReturn:
    raise UserError(STARTED)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in a folder, its module beside it; the user stands in another one."""
    folder, here = tmp_path / "work", tmp_path / "here"
    here.mkdir()
    write_images(folder / "images")
    spec = ViTSpec(width=16, depth=1, heads=2, ffn_width=32)
    network = spec.build()
    spec.init_(network, torch.Generator().manual_seed(0))
    facts = ExportFacts(32, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), {})
    write_backbone(folder / "teacher", network.state_dict(), spec, facts)
    (folder / "students_here.py").write_text(MODULE)
    text = RECIPE.replace("FOLDER", str(folder)).replace("HEADS", HEADS)
    (folder / "mine.yaml").write_text(text)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "students_here", raising=False)
    monkeypatch.setattr("distill.launch.supervisor.Supervisor.run", start_no_rank)
    monkeypatch.setattr("distill.bench.measure.LocalRanks.start", start_no_rank)
    monkeypatch.setattr("distill.bench.measure.choose_start_method", lambda _: "spawn")
    probe.cache_clear()
    return folder / "mine.yaml"


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("train", ()),
        ("plan", ("--device", "cpu")),
        ("bench", ("--against", "none")),
        ("bench job", ("--against", "none")),
        ("weights fit-heads", ()),
    ],
)
def test_allow_code__is_what_a_module_beside_the_recipe_needs(
    verb: str, options: tuple[str, ...], recipe: Path, distill: Run
) -> None:
    words = (*verb.split(), recipe, *options)
    refused = distill(*words)
    assert refused.code == 2 and refused.err.startswith(REFUSED), refused.err
    assert len(refused.err.splitlines()) == 2  # the line and its fix
    assert not recipe.with_name("imported").exists()
    allowed = distill(*words, "--allow-code")
    assert recipe.with_name("imported").exists(), allowed.err
    assert allowed.code == 0 or STARTED in allowed.err, allowed.err


@pytest.mark.parametrize(
    "words",
    [
        ("data", "show", "--images", 2),
        pytest.param(("bench", "loader", "--images", 4), marks=pytest.mark.slow),
    ],
)
def test_allow_code__commands_that_show_and_load_images_import_no_student(
    words: tuple[str, ...], recipe: Path, distill: Run
) -> None:
    for more in ((), ("--allow-code",)):
        ended = distill(*words[:2], recipe, *words[2:], *more)
        assert ended.code == 0, ended.err
        assert not recipe.with_name("imported").exists()
