"""Finds the object of a name. Nothing from outside is imported before a recipe or a command names it."""

import difflib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from distill.errors import RecipeError
from distill.extend.kinds import Kind

Table = Mapping[str, str]  # name -> "module:object"


def find(kind: Kind, name: str, builtin: Table, key: str) -> Any:
    """Imports and returns the object of a name; a built-in name cannot be taken by a package.

    Args:
        kind: what is looked for.
        name: as the recipe or the command line has it.
        builtin: the names of this project.
        key: where the name stands, for messages: a dotted key or an option.

    Raises:
        RecipeError: the name is not known, is ambiguous, or cannot be imported.
    """
    return _load(require(kind, name, builtin, key), key)


def require(kind: Kind, name: str, builtin: Table, key: str) -> EntryPoint:
    """Returns where the object of a name is, without importing it.

    Raises:
        RecipeError: as ``find``, as far as it shows without importing.
    """
    if name in builtin:
        return EntryPoint(name, builtin[name], kind.group)
    found = entry_points(group=kind.group, name=name)
    targets = sorted({point.value for point in found})
    if len(targets) > 1:
        raise RecipeError(
            f"{key} = {name}: two installed packages add it ({' and '.join(targets)})",
            fix="Uninstall one of them.",
        )
    if not targets:
        known = names(kind, builtin)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" - did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"{key} = {name}: not known{hint}; known: {', '.join(known) or 'none'}",
            fix=f"Write a known name, or install the package that adds it in the group {kind.group}.",
        )
    return next(point for point in found if point.value == targets[0])


def names(kind: Kind, builtin: Table) -> list[str]:
    """Returns all names of a kind: the built-in ones first, then those of installed packages."""
    return list(dict.fromkeys([*builtin, *sorted(p.name for p in entry_points(group=kind.group))]))


def _load(point: EntryPoint, key: str) -> Any:
    try:
        found: Any = import_module(point.module)
        for part in (point.attr or "").split("."):
            found = getattr(found, part) if part else found
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"{key} = {point.name}: {point.value} cannot be imported ({error})",
            fix="Install the package that adds it again, or leave the name out.",
        ) from error
    return found
