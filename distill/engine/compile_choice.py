"""What ``engine.compile`` of a recipe means on a machine. Imports no torch.

Networks in training are not compiled under ZeRO 3: a block runs twice a step, for global and for local crops, and
DeepSpeed finds a compiled block's gradient in a bucket that has it already.
"""

import importlib.util
import os
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from distill.errors import SetupError

Setting = bool | Literal["auto"]


@dataclass(frozen=True)
class Compiling:
    """Whether trained and frozen networks are compiled; ``why_not``: a line for people where one might expect more."""

    trained: bool = False
    frozen: bool = False
    why_not: str = ""


def compiling(setting: Setting, device_type: str, zero_stage: int) -> Compiling:
    """Decides what ``engine.compile`` means on a device: ``auto`` compiles on a GPU what can be compiled there.

    Raises:
        SetupError: the recipe wants it, and something is missing.
    """
    is_wanted = device_type == "cuda" if setting == "auto" else setting
    if not is_wanted or device_type == "meta":
        return Compiling()
    lacking = what_is_lacking(device_type)
    if lacking and setting == "auto":
        return Compiling(why_not=f"engine.compile: nothing is compiled, {lacking}")
    if lacking:
        raise SetupError(
            f"engine.compile = true: {lacking}", fix="Install it, or write `compile: auto`."
        )
    if zero_stage < 3:
        return Compiling(trained=True, frozen=True)
    if setting == "auto":
        text = "engine.compile: trained networks are not compiled, with engine.zero = 3"
        return Compiling(frozen=True, why_not=text)
    raise SetupError(
        "engine.compile = true: trained networks cannot be compiled with engine.zero = 3",
        fix="Write `compile: auto` or `compile: false`, or take `zero: 1` or `zero: 2`.",
    )


def what_is_lacking(device_type: str) -> str:
    """Returns what the compiler needs and this machine does not have; empty where it has all."""
    names: tuple[str, ...] = (os.environ.get("CXX", "g++"),)
    if device_type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        names = (os.environ.get("CC", "gcc"), "clang", "cc")
    if not any(shutil.which(name) for name in names):
        kind = "C" if device_type == "cuda" else "C++"
        return f"there is no {kind} compiler ({names[0]})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else f"Python's headers are missing ({header})"
