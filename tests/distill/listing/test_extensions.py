"""Names of built-in objects and of objects that installed packages add."""

import sys
from pathlib import Path

import pytest

from distill.errors import RecipeError
from distill.listing import extensions
from distill.listing.extensions import BUILTIN, ExtensionKind, find, names, require


@pytest.fixture
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {**BUILTIN, ExtensionKind.SINK: {"depth": "distill.listing.extensions:GROUP_PREFIX"}}
    monkeypatch.setattr(extensions, "BUILTIN", table)


def install(folder: Path, package: str, lines: str, module: str = "") -> None:
    """Makes ``folder`` look like site-packages that hold a package with entry points."""
    facts = folder / f"{package}-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[distill.sinks]\n{lines}\n")
    (folder / f"{package}.py").write_text(module)


@pytest.mark.usefixtures("_table")
def test_find__takes_the_table_first_and_imports_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(
        tmp_path,
        "toy_one",
        "toy = toy_one:Inner.value\ndepth = toy_one:no",
        "class Inner:\n    value = 3",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find(ExtensionKind.SINK, "depth", "place") == "distill."
    assert names(ExtensionKind.SINK) == ["depth", "toy"] and names(ExtensionKind.LOSS) == []
    require(ExtensionKind.SINK, "toy", "place")
    assert "toy_one" not in sys.modules
    assert find(ExtensionKind.SINK, "toy", "place") == 3
    assert "toy_one" in sys.modules


@pytest.mark.usefixtures("_table")
def test_find__says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "one", "toy_two", "twice = toy_two:a\ngone = toy_two:b\nlost = toy_lost:c")
    install(tmp_path / "two", "toy_three", "twice = toy_three:a")
    for folder in ("one", "two"):
        monkeypatch.syspath_prepend(tmp_path / folder)
    with pytest.raises(
        RecipeError, match=r"a\.b = dept: not known - did you mean 'depth'\?; known: depth, gone"
    ) as failed:
        find(ExtensionKind.SINK, "dept", "a.b")
    assert "in the group distill.sinks" in failed.value.fix
    with pytest.raises(
        RecipeError, match=r"twice: two installed packages add it \(toy_three:a and toy_two:a\)"
    ):
        require(ExtensionKind.SINK, "twice", "a.b")
    with pytest.raises(
        RecipeError, match=r"gone: toy_two:b cannot be imported \(.*no attribute 'b'"
    ):
        find(ExtensionKind.SINK, "gone", "a.b")
    with pytest.raises(RecipeError, match="lost: toy_lost:c cannot be imported"):
        find(ExtensionKind.SINK, "lost", "a.b")


def test_builtin__every_name_is_there() -> None:
    for kind, table in BUILTIN.items():
        for name in table:
            assert callable(find(kind, name, "a.b")) or kind is ExtensionKind.EXPORTER
