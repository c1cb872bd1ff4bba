"""Which code a recipe may name: what lies in the current folder, and anything once it is allowed."""

import sys
from pathlib import Path

import pytest

from distill.errors import RecipeError
from distill.listing.outside_code import ALLOWED, allow, path_of, require_allowed

LEAVES_A_MARK = "open(__file__ + '.ran', 'w')\n"


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, "")
    monkeypatch.setattr(sys, "path", [*sys.path])


def package_in(folder: Path) -> Path:
    """A package that leaves a mark where any part of it runs; returns the file of its inner module."""
    inner = folder / "outside_pkg" / "inner"
    inner.mkdir(parents=True)
    for path in (inner.parent / "__init__.py", inner / "__init__.py", inner / "net.py"):
        path.write_text(LEAVES_A_MARK)
    return inner / "net.py"


def test_path_of__runs_neither_the_module_nor_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = package_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert path_of("outside_pkg.inner.net:make") == module
    assert path_of("outside_pkg:make") == tmp_path / "outside_pkg" / "__init__.py"
    assert path_of("outside_pkg.missing:make") is None
    assert path_of("outside_pkg.inner.net.deeper:make") is None
    assert path_of("no_such_module_anywhere:make") is None
    assert path_of("timm:resnet18") is None
    assert not [*tmp_path.rglob("*.ran")] and "outside_pkg" not in sys.modules


def test_require_allowed__takes_the_current_folder_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_in(tmp_path / "here")
    package_in(tmp_path / "here" / ".venv" / "lib" / "site-packages" / "vendored")
    monkeypatch.chdir(tmp_path / "here")
    require_allowed("outside_pkg.inner.net:make")
    require_allowed("transformers:convnextv2")
    require_allowed("no_such_module_anywhere:make")  # its import gives the reason
    with pytest.raises(
        RecipeError, match=r"arch = torch\.hub:load: runs code of .*hub\.py"
    ) as error:
        require_allowed("torch.hub:load")
    assert error.value.fix == "If you trust it, pass --allow-code."
    sys.path.append(str(tmp_path / "here" / ".venv" / "lib" / "site-packages" / "vendored"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match="not in the folder you stand in"):
        require_allowed("outside_pkg:make")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "outside_pkg").rename(tmp_path / "here" / "moved")
    with pytest.raises(RecipeError, match="site-packages"):  # an environment inside the folder
        require_allowed("outside_pkg:make")
    allow()
    require_allowed("outside_pkg:make")
    require_allowed("torch.hub:load")
