"""A run that 0.1.0 began, saved and left: the present code ends it, with the bits that 0.1.0 itself ended with.

``tests/fixtures/run-0.1.0`` holds it. Bits can be the same only on the kind of machine that the run was made on,
with the same versions of what computes; ``machine`` in ``ended.json`` is a hash over both. On another machine the
weights are compared closely.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.jobs import ENVIRONMENT

ROOT = Path(__file__).parent.parent
STORED = ROOT / "tests" / "fixtures" / "run-0.1.0"
ENDED = json.loads((STORED / "ended.json").read_text())
STUDENTS = ("vit", "conv")
SAVED_STEP, NUM_STEPS = 12, 20
COMPUTING = ("torch", "deepspeed", "numpy", "nvidia-dali-cuda130")
# 20 steps of AdamW turn a last-bit difference of a gradient into about a learning rate, 1e-3, at worst
ATOL = 5e-3

pytestmark = pytest.mark.slow


def machine() -> str:
    """A hash over the processor and the versions that decide the last bits."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    # the stored run was made with DALI for CUDA 12, which decodes to the same bits on the CPU
    versions = [f"{name} {version(name)}".replace("cuda130", "cuda120") for name in COMPUTING]
    return hashlib.sha256("\n".join([*sorted(processor), *versions]).encode()).hexdigest()[:16]


def train(folder: Path) -> str:
    """What ``distill train family.yaml --out .`` prints in a folder."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    ended = subprocess.run(
        [sys.executable, "-m", "distill", "train", "family.yaml", "--out", "."],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The stored run, ended by the present code, and what that printed."""
    folder = shutil.copytree(STORED, tmp_path_factory.mktemp("resumed") / "copy")
    return folder / "family", train(folder)


def assert_same_students(run: Path, expected: dict[str, Path]) -> None:
    """The same bits where the stored run was made on such a machine, close ones elsewhere."""
    for name, path in expected.items():
        mine, theirs = load_file(run / "students" / name / "model.safetensors"), load_file(path)
        assert mine.keys() == theirs.keys()
        atol = 0.0 if machine() == ENDED["machine"] else ATOL
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, rtol=0, atol=atol, msg=f"{name} {key}")


def test_train__goes_on_with_a_run_of_0_1_0(resumed: tuple[Path, str]) -> None:
    run, screen = resumed
    assert f"resumes from family-{SAVED_STEP:07d} (family step {SAVED_STEP})" in screen
    assert not re.search(r"not used|damaged|another|no longer|new, starts", screen, re.I)
    before, after = (
        json.loads((folder / "manifest.json").read_text())
        for folder in sorted((run / "checkpoints").glob("family-*"))
    )
    assert (before["step"], after["step"]) == (SAVED_STEP, NUM_STEPS)
    for key in ("recipe_hash", "networks", "num_ranks"):
        assert after[key] == before[key]
    for name in STUDENTS:
        rows = (run / "metrics" / f"{name}.jsonl").read_text()
        assert rows.startswith((STORED / "family" / "metrics" / f"{name}.jsonl").read_text())
        assert [json.loads(row)["step"] for row in rows.splitlines()] == [10, NUM_STEPS]
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert set(json.loads((run / "summary.json").read_text())["students"]) == set(STUDENTS)


def test_train__ends_a_run_of_0_1_0_as_0_1_0_did(resumed: tuple[Path, str]) -> None:
    run, _ = resumed
    assert_same_students(run, {name: STORED / "ended" / f"{name}.safetensors" for name in STUDENTS})
    if machine() == ENDED["machine"]:
        files = {name: run / "students" / name / "model.safetensors" for name in STUDENTS}
        found = {
            name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
        }
        assert found == ENDED["model.safetensors"]


def test_train__a_run_of_0_1_0_ends_as_if_never_stopped(
    resumed: tuple[Path, str], tmp_path: Path
) -> None:
    for name in ("images", "pretrained"):
        shutil.copytree(STORED / name, tmp_path / name)
    shutil.copyfile(STORED / "family.yaml", tmp_path / "family.yaml")
    train(tmp_path)
    students = tmp_path / "family" / "students"
    files = {name: students / name / "model.safetensors" for name in STUDENTS}
    assert_same_students(resumed[0], files)
