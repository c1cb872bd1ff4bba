"""Rules about the tree itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Top to bottom: a package imports only from packages below it.
ORDER = (
    "distill.__main__",
    "distill.cli",
    "distill.launch",
    "distill.bench",
    "distill.evaluate",
    "distill.screen",
    "distill.job",
    "distill.train",
    "distill.engine",
    "distill.plan",
    "distill.checkpoint",
    "distill.weights",
    "distill.recipe",
    "distill.data",
    "distill.runfolder",
    "students",
    "teacher",
    "distill.errors",
)
MOST_FLOORS = 10
MOST_LINES_OF_A_PACKAGE = 3000
MOST_LINES_OF_A_MODULE = 400
FLAT = {"__init__.py", "__main__.py", "errors.py"}  # all that lies in distill/ itself
FILES = [
    path
    for package in ("teacher", "students", "distill")
    for path in sorted((ROOT / package).rglob("*.py"))
]


def package_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "distill" else parts[0]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def arrows() -> dict[str, set[str]]:
    """Which packages each package imports from."""
    found: dict[str, set[str]] = {name: set() for name in ORDER}
    for path in FILES:
        own = package_of(module_of(path))
        if own == "distill.__init__":
            continue
        ours = {
            package_of(name)
            for name in imported(path)
            if name.split(".")[0] in {"distill", "students", "teacher"}
        }
        found[own] |= ours - {own}
    return found


def floors(below: dict[str, set[str]]) -> dict[str, int]:
    """The length of the longest chain of imports under each package."""
    height: dict[str, int] = {}
    for name in reversed(ORDER):
        height[name] = 1 + max((height[other] for other in below[name]), default=0)
    return height


def test_packages__import_only_what_lies_below() -> None:
    below = arrows()
    for index, name in enumerate(ORDER):
        assert below[name] <= set(ORDER[index + 1 :]), f"{name} imports upward"
    assert max(floors(below).values()) <= MOST_FLOORS


def test_packages__are_of_a_size_to_read_and_say_what_they_are_for() -> None:
    for name in ORDER:
        folder = ROOT / name.replace(".", "/")
        if not folder.is_dir():
            continue
        modules = [path for path in folder.rglob("*.py") if path.name != "__init__.py"]
        assert len(modules) > 1, f"{name} has one module only"
        lines = sum(len(path.read_text().splitlines()) for path in modules)
        assert lines <= MOST_LINES_OF_A_PACKAGE, f"{name} has {lines} lines"
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), name


def test_distill__has_no_logic_outside_its_packages() -> None:
    assert {path.name for path in (ROOT / "distill").glob("*.py")} == FLAT


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports__are_those_a_package_may_have(path: Path) -> None:
    names = {name.split(".")[0] for name in imported(path)}
    assert not names & {"torchvision", "timm", "transformers", "pickle", "yaml"}
    if path.relative_to(ROOT).parts[0] != "distill":
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
