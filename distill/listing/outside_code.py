"""Code from outside that a recipe or weights name: where it is, and whether it may run.

What lies in the folder that the user stands in may run, and so may what an installed package declares for
distill by an entry point. Any other function of any module needs ``--allow-code``: a recipe is a file from
somebody, and could name one that does harm. So does code in a folder that came with the weights that name it.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from distill.errors import RecipeError

ALLOWED = "DISTILL_ALLOW_CODE"  # an environment variable, so that ranks have it from their launcher
INSTALLED = {"site-packages", "dist-packages"}  # an environment may lie in the folder one stands in
LIBRARIES = ("transformers", "timm")  # build networks by name and run no code of a folder


def allow() -> None:
    """Lets this process, and the ranks that it starts, run whatever code a recipe names."""
    os.environ[ALLOWED] = "1"


def require_allowed(factory: str, key: str = "arch", weights: Path | None = None) -> None:
    """Refuses the factory of a custom student that may not run. A module that is not found is left to the import.

    Args:
        factory: ``module:object``.
        key: what names it, for the message.
        weights: the folder of weights that names it, if it is one.

    Raises:
        RecipeError: it is outside the folder that the user stands in, or in one folder there with the weights, and
            was not allowed.
    """
    path = path_of(factory)
    if path is None or os.environ.get(ALLOWED):
        return
    parts = _parts_here(path)
    if parts and (weights is None or parts[:1] != _parts_here(weights)[:1]):
        return
    where = "came with the weights" if parts else "is not in the folder you stand in"
    raise RecipeError(
        f"{key} = {factory}: runs code of {path}, which {where}",
        fix="If you trust it, pass --allow-code.",
    )


def path_of(name: str) -> Path | None:
    """Returns the file or folder of the module of ``module:object``; None where it is not found. Loads nothing."""
    module = name.partition(":")[0]
    found = None if module in LIBRARIES else _find(module)
    if found is None:
        return None
    locations = list(found.submodule_search_locations or ())
    origin = found.origin if found.has_location else None
    return Path(origin or (locations or [found.origin or module])[0]).absolute()


def _find(module: str) -> ModuleSpec | None:
    """Looks a module up as an import does; its parents are not imported."""
    if "" not in sys.path:
        sys.path.append("")  # the current folder, after everything that is installed
    first, *rest = module.split(".")
    try:
        found = importlib.util.find_spec(first)
    except ValueError:  # a module that was made by hand
        return None
    name = first
    for part in rest:
        name = f"{name}.{part}"
        if found is None or found.submodule_search_locations is None:
            return None
        found = PathFinder.find_spec(name, found.submodule_search_locations)
    return found


def _parts_here(path: Path) -> tuple[str, ...]:
    """The parts of a path below the current folder; none where it is elsewhere or is installed there."""
    here, resolved = Path.cwd().resolve(), path.resolve()
    parts = resolved.relative_to(here).parts if resolved.is_relative_to(here) else ()
    return () if INSTALLED & set(parts) else parts
