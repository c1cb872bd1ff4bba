"""Files that people look for: licences, citation, issue forms, what a wheel holds, and that it runs by itself."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support import third_party
from tests.support.jobs import ENVIRONMENT

ROOT = Path(__file__).parent.parent
PACKAGES = ("distill", "students", "teacher", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"


def written_rows() -> dict[str, str]:
    lines = (ROOT / "THIRD_PARTY.md").read_text().splitlines()
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}


@pytest.mark.parametrize("name", third_party.direct_dependencies())
def test_third_party__names_every_dependency_with_its_licence(name: str) -> None:
    assert written_rows().get(name) == third_party.table()[name], (
        "python -m tests.support.third_party"
    )


def test_third_party__is_what_the_command_writes() -> None:
    assert (ROOT / "THIRD_PARTY.md").read_text() == third_party.page()


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("License-Expression: MIT\nLicense: old words", "MIT"),
        ("License: long\nClassifier: License :: OSI Approved :: BSD License", "BSD License"),
        ("License: Apache 2.0", "Apache 2.0"),
        ("Summary: nothing", "none stated"),
    ],
)
def test_licence_of__takes_the_most_exact_statement(
    text: str, licence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "toy-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: toy\nVersion: 1.0\n{text}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert third_party.licence_of("toy") == licence


def test_version__is_the_same_everywhere() -> None:
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = YAML(typ="safe").load((ROOT / "CITATION.cff").read_text())
    assert heading is not None
    assert citation["version"] == PROJECT["version"] == heading[1]
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert all({"type", "title", "authors"} <= each.keys() for each in citation["references"])


def test_issue_forms__have_what_a_form_needs_and_ask_for_doctor() -> None:
    ids = {}
    for path in FORMS.glob("*_re*.yml"):
        form = YAML(typ="safe").load(path.read_text())
        assert form["name"] and form["description"]
        fields = [part for part in form["body"] if part["type"] != "markdown"]
        assert all(part["attributes"]["label"] for part in fields)
        ids[path.stem] = [part["id"] for part in fields]
        assert len(set(ids[path.stem])) == len(fields)
    assert ids.keys() == {"bug_report", "feature_request"}
    assert "distill doctor --json" in (FORMS / "bug_report.yml").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the tree, built by the installed setuptools."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        hidden = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / package, ignore=hidden)
    (folder / "tests").mkdir()
    (folder / "tests" / "__init__.py").touch()
    for name in ("pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]):
        shutil.copy(ROOT / name, folder / name)
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stderr
    return zipfile.ZipFile(next((folder / "dist").glob("*.whl")))


def test_wheel__holds_every_package_recipe_and_type_marker(wheel: zipfile.ZipFile) -> None:
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for pattern in ("*.py", "*.yaml", "py.typed")
        for path in (ROOT / package).rglob(pattern)
    }
    assert {f"{package}/py.typed" for package in ("distill", "students", "teacher")} <= expected
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_wheel__holds_its_licences_and_says_linux(wheel: zipfile.ZipFile) -> None:
    names = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    assert set(PROJECT["license-files"]) <= names.keys()
    metadata = wheel.read(names["METADATA"]).decode()
    assert f"\nVersion: {PROJECT['version']}\n" in metadata
    systems = re.findall(r"^Classifier: Operating System :: (.+)$", metadata, re.MULTILINE)
    assert systems == ["POSIX :: Linux"]


FEW_STEPS = (
    "schedule.steps=2",
    "schedule.batch=32",
    "teacher:schedule.batch=32",
    "teacher:stages.0.steps=2",
    "teacher:stages.1.steps=2",
    "teacher:stages.1.gram.teacher=base@1",
    "teacher:stages.1.gram.refresh=1",
    "crops.eval_size=32",  # a quarter of the patches to score
    "teacher:crops.eval_size=32",
)


@pytest.fixture(scope="module")
def program(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``distill`` of a fresh environment with the wheel; what it depends on is that of this interpreter."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    packages = next(folder.glob("lib/python*/site-packages"))
    outer = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "outer.pth").write_text("".join(f"{path}\n" for path in outer))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    install = [*pip, "--quiet", "--no-index", "--no-deps", "--force-reinstall"]
    done = subprocess.run([*install, str(wheel.filename)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (packages / "recipes" / "quickstart.yaml").is_file()
    return folder / "bin" / "distill"


def run_outside(program: Path, folder: Path, *words: str) -> str:
    """What the command prints in a folder that holds nothing of this repository."""
    environment = {key: text for key, text in ENVIRONMENT.items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        [program, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow  # a fresh environment, and a whole job
def test_wheel__trains_the_quickstart_outside_the_repository(program: Path, tmp_path: Path) -> None:
    assert "quickstart " in run_outside(program, tmp_path, "recipes", "list")
    run_outside(program, tmp_path, "recipes", "copy", "quickstart", "my.yaml")
    assert (tmp_path / "my.yaml").is_file() and (tmp_path / "quickstart_teacher.yaml").is_file()
    run_outside(program, tmp_path, "train", "quickstart", "--plain", *FEW_STEPS)
    run = tmp_path / "runs" / "quickstart"
    students = json.loads((run / "summary.json").read_text())["students"]
    assert students.keys() == {"small", "gated", "convnext"}
    assert (run / "students" / "small" / "model.safetensors").is_file()
