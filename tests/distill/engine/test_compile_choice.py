"""What ``engine.compile`` means on machines that have, or lack, what the compiler needs."""

import importlib.util
import shutil
import sysconfig
from pathlib import Path

import pytest

from distill.engine.compile_choice import Compiling, compiling
from distill.errors import SetupError


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compilers, headers and triton are there."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(
    ("setting", "device", "zero", "wanted"),
    [
        (False, "cuda", 1, Compiling()),
        ("auto", "cpu", 1, Compiling()),
        ("auto", "cuda", 1, Compiling(trained=True, frozen=True)),
        (True, "cpu", 2, Compiling(trained=True, frozen=True)),
        (True, "meta", 1, Compiling()),
    ],
)
def test_compiling__auto_is_on_a_gpu(
    setting: bool | str, device: str, zero: int, wanted: Compiling
) -> None:
    assert compiling(setting, device, zero) == wanted  # type: ignore[arg-type]


@pytest.mark.usefixtures("everything")
def test_compiling__under_zero_3_trained_networks_stay_as_written() -> None:
    found = compiling("auto", "cuda", 3)
    assert found.frozen and not found.trained
    assert "trained networks are not compiled, with engine.zero = 3" in found.why_not
    with pytest.raises(SetupError, match=r"cannot be compiled with engine\.zero = 3") as error:
        compiling(True, "cpu", 3)
    assert "zero: 1" in error.value.fix


@pytest.mark.usefixtures("everything")
@pytest.mark.parametrize(
    ("device", "lacks", "text"),
    [
        ("cuda", "triton", "the package triton is not installed"),
        ("cuda", "compiler", "there is no C compiler (gcc)"),
        ("cpu", "compiler", "there is no C++ compiler (g++)"),
        ("cpu", "headers", "Python's headers are missing"),
    ],
)
def test_compiling__without_its_tools_auto_falls_back_and_true_is_refused(
    device: str, lacks: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    if lacks == "triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    elif lacks == "compiler":
        monkeypatch.setattr(shutil, "which", lambda _: None)
    else:
        monkeypatch.setattr(sysconfig, "get_path", lambda _: "/nowhere")
    with pytest.raises(SetupError) as error:
        compiling(True, device, 1)
    assert text in error.value.message and "compile: auto" in error.value.fix
    if device == "cuda":
        found = compiling("auto", device, 1)
        assert not found.trained and not found.frozen and text in found.why_not
