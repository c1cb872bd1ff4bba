"""Rules about the tree itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "teacher": {"teacher"},
    "students": {"students", "teacher"},
    "distill": {"distill", "students", "teacher"},
}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports__go_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    names = imported(path)
    assert not (names & ALLOWED.keys()) - ALLOWED[package]
    assert not names & {"torchvision", "timm", "transformers", "pickle", "yaml"}
    if package != "distill":
        assert not names & {"pathlib", "logging", "rich", "os"}, (
            "teacher and students touch no files and print nothing"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_annotations__are_not_postponed(path: Path) -> None:
    assert "from __future__ import annotations" not in path.read_text(), (
        "it disables the run-time shape checks"
    )


def test_groups__are_made_in_one_file() -> None:
    makers = {path.name for path in FILES if "new_group(" in path.read_text()}
    assert makers == {"groups.py"}
