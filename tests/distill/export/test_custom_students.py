"""Custom students from the command line, as a user types it: trained, exported, read in another process, scored."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distill.evaluate.over_steps import load_ema
from students.custom import probe
from students.shapes import CustomSpec
from tests.support.custom_nets import ARGS, forget, write_module
from tests.support.exports import VIT, write_network
from tests.support.jobs import ENVIRONMENT
from tests.support.scored_run import write_splits
from tests.support.timm_shim import INSTALL, write_startup

ROOT = Path(__file__).parents[3]
RECIPE = """\
name: mine
format: 3
teacher: {weights: teacher, heads: none}
students:
STUDENTS
data: {sources: [{path: images/train}]}
crops: {global: 64, local: {count: 2, size: 32}}
schedule: {batch: 32, steps: 6, lr: {peak: 1.0e-3}}
engine: {device: cpu, processes: 2, precision: fp32}
"""
EDGE = f'  - {{name: edge, arch: "edgenets:Normed", args: {json.dumps(ARGS)}}}'
OF_TIMM = '  - {name: mobile, arch: "timm:mobilenetv3_small_050"}'
READER = """\
import json, sys, torch
from edgenets import Normed
from safetensors.torch import load_file
folder, out = sys.argv[1:]
network = Normed(**json.load(open(f"{folder}/config.json"))["args"])
network.load_state_dict(load_file(f"{folder}/model.safetensors"))
pixels = torch.randn(2, 3, 64, 40, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save((pixels, *network.eval()(pixels)), out)
assert "distill" not in sys.modules
"""


def typed(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, in a folder; the tree is found from anywhere, and what ``shim`` declares."""
    paths = (str(here / "shim"), str(ROOT), os.environ.get("PYTHONPATH", ""))
    return subprocess.run(
        [sys.executable, *words],
        cwd=here,
        env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow  # five processes that import torch, one of which trains on two ranks
def test_custom_student__from_training_to_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = write_module(tmp_path, "edgenets")
    write_network(tmp_path / "teacher", VIT)
    write_splits(tmp_path / "images", (40, 8))
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("STUDENTS", EDGE))
    program = ("-m", "distill")
    for words in (
        ("train", "mine.yaml", "--plain"),
        ("export", "runs/mine", "--to", "factory"),
        ("export", "runs/mine", "--to", "onnx", "--student", "edge"),
    ):
        ended = typed(tmp_path, *program, *words)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    folder = tmp_path / "runs/mine/export/factory/edge"
    assert json.loads((folder / "distill.json").read_text())["steps"] == 6

    ended = typed(tmp_path, "-W", "ignore", "-c", READER, str(folder), "found.pt")
    assert ended.returncode == 0, ended.stderr
    pixels, class_feature, patch_map = torch.load(tmp_path / "found.pt")
    monkeypatch.chdir(tmp_path)
    forget(factory)
    spec = probe(factory, json.dumps(ARGS))
    forget(factory)
    assert torch.equal(class_feature, ema_of(tmp_path / "runs/mine", spec)(pixels).class_token)
    found = ema_of(tmp_path / "runs/mine", spec)(pixels).patch_tokens
    assert torch.equal(patch_map.flatten(2).transpose(1, 2), found)

    words = ("eval", str(folder), "--data", str(tmp_path / "images" / "train"), "--json")
    (tmp_path / "elsewhere").mkdir()
    refused = typed(tmp_path / "elsewhere", *program, *words)
    assert refused.returncode == 1 and "No module named 'edgenets'" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 2 and not refused.stdout
    (folder / "edgenets.py").write_text((tmp_path / "edgenets.py").read_text())
    ended = typed(tmp_path / "elsewhere", *program, *words, "--allow-code")
    assert ended.returncode == 0, ended.stderr
    assert 0.0 <= json.loads(ended.stdout)["students"]["edge"]["knn"] <= 1.0


@pytest.mark.slow  # six processes that import torch, one of which trains on two ranks
def test_student_of_timm__is_trained_exported_and_scored(tmp_path: Path) -> None:
    write_startup(tmp_path / "shim")
    ended = typed(tmp_path, "-c", "import timm")
    if ended.returncode != 0:
        reason = ended.stderr.strip().splitlines()[-1]
        pytest.skip(f"timm does not import here ({reason}); {INSTALL}")
    write_network(tmp_path / "teacher", VIT)
    write_splits(tmp_path / "images", (40, 8))
    (tmp_path / "mine.yaml").write_text(RECIPE.replace("STUDENTS", OF_TIMM))
    program = ("-m", "distill")
    for words in (
        ("train", "mine.yaml", "--plain"),
        ("export", "runs/mine", "--to", "factory"),
        ("export", "runs/mine", "--to", "onnx"),
    ):
        ended = typed(tmp_path, *program, *words)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    folder = str(tmp_path / "runs/mine/export/factory/mobile")
    ended = typed(tmp_path, *program, "eval", folder, "--data", str(tmp_path / "images"), "--json")
    assert ended.returncode == 0, ended.stderr
    assert 0.0 <= json.loads(ended.stdout)["students"]["mobile"]["knn"] <= 1.0


@torch.no_grad()
def ema_of(run: Path, spec: CustomSpec) -> torch.nn.Module:
    """The EMA of the last checkpoint, running statistics of BatchNorm included."""
    (file,) = (run / "checkpoints").glob("family-*/edge.safetensors")
    return load_ema(file, spec).requires_grad_(False)
