"""The command works in a user's folder that holds names of ours, and takes modules from where it may."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import distill
from distill.__main__ import user_folder_last

ROOT = Path(distill.__file__).parents[1]
NET = """\
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.stride = 12, 16
        self.conv = nn.Conv2d(3, 12, 16, 16)

    def forward(self, image):
        patch_map = self.conv(image)
        return patch_map.mean((2, 3)), patch_map
"""
RECIPE = """\
name: mine
teacher: {arch: vits16, weights: nowhere, fit: {heads: HEADS}}
students:
  - {name: net, arch: "mynet:Net", head_widths: {dino_hidden: 16, ibot_hidden: 16}}
data: {sources: [{path: images}]}
crops: {global: {size: 64}, local: {count: 2, size: 32}}
schedule: {batch: 8, steps: 10, lr: {peak: 1.0e-3}}
engine: {device: cpu, processes: 1, precision: fp32}
"""
HEADS = "{dino: {hidden: 16, bottleneck: 8, prototypes: 16}, ibot: {hidden: 16, bottleneck: 8, prototypes: 16}}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder whose every name is one of ours; the recipe and its network lie in ``work``."""
    for name in ("teacher", "students", "recipes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    (tmp_path / "work").mkdir()
    (tmp_path / "work/mynet.py").write_text(NET)
    (tmp_path / "work/mine.yaml").write_text(RECIPE.replace("HEADS", HEADS))
    return tmp_path


def run(folder: Path, path: str, *words: str) -> subprocess.CompletedProcess[str]:
    """``python -m distill`` in a folder, with that search path."""
    return subprocess.run(
        [sys.executable, "-m", "distill", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_user_folder_last__moves_it_and_leaves_other_paths_alone() -> None:
    here = os.path.realpath(os.curdir)
    assert user_folder_last(["", "/a", ".", "/b"], here) == ["/a", "/b", here]
    assert user_folder_last(["/a", "/b"], here) == ["/a", "/b"]


@pytest.mark.slow  # four commands that import torch
@pytest.mark.parametrize("words", ["", "PYTHONPATH=."])
def test_plan__a_module_beside_the_recipe_needs_to_be_allowed(words: str, folder: Path) -> None:
    path = f".{os.pathsep}{ROOT}" if words else str(ROOT)
    ended = run(folder, path, "plan", "work/mine.yaml", "--device", "cpu")
    assert ended.returncode == 2 and "or pass --allow-code" in ended.stderr, ended.stderr
    ended = run(folder, path, "plan", "work/mine.yaml", "--device", "cpu", "--allow-code")
    assert ended.returncode == 0 and "net" in ended.stdout, ended.stderr


def test_plan__a_module_in_the_folder_that_the_user_stands_in(folder: Path) -> None:
    (folder / "work/mynet.py").rename(folder / "mynet.py")
    ended = run(folder, str(ROOT), "plan", "work/mine.yaml", "--device", "cpu")
    assert ended.returncode == 0 and "net" in ended.stdout, ended.stderr


@pytest.mark.slow  # builds and installs the package
def test_wheel__works_beside_a_users_own_teacher_students_and_recipes(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    source = made / "source"
    for name in ("distill", "students", "teacher", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([*pip, "wheel", source, *options, "-w", made], check=True)
    (wheel,) = made.glob("*.whl")
    subprocess.run([*pip, "install", wheel, *options, "--target", made / "site"], check=True)
    (folder / "work/mynet.py").rename(folder / "mynet.py")
    environment = {**os.environ, "PYTHONPATH": str(made / "site")}
    for words in (
        ["plan", "work/mine.yaml", "--device", "cpu"],
        ["recipes", "copy", "quickstart", "quick.yaml"],
        ["--version"],
    ):
        ended = subprocess.run(
            [made / "site/bin/distill", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert ended.returncode == 0, ended.stderr
    where = [
        sys.executable,
        "-c",
        "import sys; sys.path.pop(0); import teacher, recipes; print(teacher.__file__)",
    ]
    found = subprocess.run(
        where, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout).is_relative_to(made / "site")
