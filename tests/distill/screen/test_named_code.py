"""``distill check`` on hostile recipes and run folders lists code and runs none of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import HEADS, write_images
from tests.support.way_of_a_batch import ROOT

# Runs the command and writes every import, opened file, process and connection that Python reports.
AUDIT = """\
import json, os, sys
notes = open(sys.argv.pop(1), "w", buffering=1)
WATCHED = ("import", "open", "subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect", "pickle.find_class")
def note(event, args):
    if event in WATCHED:
        what = args[0] if args else ""
        notes.write(json.dumps([event, str(what)]) + "\\n")
sys.addaudithook(note)
from distill.cli.app import main
main(sys.argv[1:])
"""
TRAP = "open(__file__ + '.ran', 'w')\n"
RECIPE = """\
name: mine
teacher: {weights: FOLDER/teacher, arch: vits16, heads: fit, fit: {steps: 2, heads: HEADS}}
students:
  - {name: a, arch: "trap:make"}
  - {name: b, arch: "torch.hub:load", args: {repo_or_dir: somebody/repository}}
  - {name: c, arch: "os:system", args: {command: "touch FOLDER/ran"}}
  - {name: d, arch: vits16}
data: {sources: [{path: FOLDER/images}]}
crops: {global: {size: 64}, local: {count: 2, size: 32}}
schedule: {batch: 8, steps: 10, lr: {peak: 1.0e-3}}
engine: {device: cpu, processes: 1, precision: fp32}
"""
# Names that Python or a library might import from the folder that one stands in
NAMES = ("trap", "sitecustomize", "usercustomize", "yaml", "students", "torch", "conftest")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder from somebody: a recipe, modules that leave a mark when they run, and files to be unpickled."""
    write_images(tmp_path / "images")
    (tmp_path / "teacher").mkdir()
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(TRAP)
    for name in ("job.json", "model.pth", "optimizer.pt", "data.pkl"):
        (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.")
    text = RECIPE.replace("FOLDER", str(tmp_path)).replace("HEADS", HEADS)
    (tmp_path / "recipe.resolved.yaml").write_text(text)
    return tmp_path


def audited(folder: Path, here: Path, *words: str) -> tuple[str, list[tuple[str, str]]]:
    """Output of the command in ``here``, and what it did."""
    notes = folder.parent / "notes.jsonl"
    here.mkdir(exist_ok=True)
    ended = subprocess.run(
        [sys.executable, "-P", "-c", AUDIT, str(notes), *words],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    lines = notes.read_text().splitlines()
    return ended.stdout, [(event, what) for event, what in map(json.loads, lines)]


@pytest.mark.slow  # a process that imports torch, twice
@pytest.mark.parametrize("stands_in_it", [False, True])
def test_check__lists_code_and_runs_none_of_it(folder: Path, stands_in_it: bool) -> None:
    here = folder if stands_in_it else folder.parent / "elsewhere"
    said, events = audited(folder, here, "check", str(folder / "recipe.resolved.yaml"))
    listed = [line.split(",")[0] for line in said.splitlines() if line.startswith("not loaded")]
    assert listed == [
        "not loaded: students.0.arch = trap:make",
        "not loaded: students.1.arch = torch.hub:load",
        "not loaded: students.2.arch = os:system",
    ]
    assert "valid as far as it shows without that code" in said
    assert not [*folder.rglob("*.ran"), *folder.rglob("ran")]
    acts = {event for event, _ in events}
    assert acts <= {"import", "open", "subprocess.Popen"}, acts
    assert {what for event, what in events if event == "subprocess.Popen"} == set()
    opened = {Path(what) for event, what in events if event == "open"}
    inside = {path.relative_to(folder) for path in opened if path.is_relative_to(folder)}
    # of the teacher only what states its licence
    assert {str(path) for path in inside} <= {"recipe.resolved.yaml", "teacher/README.md"}
    imported = {what for event, what in events if event == "import"}
    assert "trap" not in imported
