"""Finds what a package from outside adds by its name. Nothing is imported before a recipe or a command names it.

The kinds are a closed list. A package adds an object with an entry point in its metadata and nothing else:

    [project.entry-points."distill.sinks"]
    tracker = "my_package.tracking:TrackerSink"

Students need no entry point: a recipe names their factory, ``arch: my_package.networks:make``.
"""

import difflib
from collections.abc import Mapping
from enum import StrEnum
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from distill.errors import RecipeError

GROUP_PREFIX = "distill."  # before the kind, in the name of an entry-point group


class ExtensionKind(StrEnum):
    """What can be added, each by the name of its group; the comments say where the promise of each is."""

    LOSS = "losses"  # a factory: distill.recipe.keys.FamilyRecipe to teacher.losses.LossTerm
    SOURCE = "sources"  # distill.data.sources.Lister
    EXPORTER = "exporters"  # distill.export.exporter.Exporter
    LAUNCHER = "launchers"  # distill.launch.local.Launcher
    SINK = "sinks"  # distill.runfolder.metrics.SinkFactory
    KEYS = "keys"  # distill.recipe.types.Section

    @property
    def group(self) -> str:
        """The group of entry points."""
        return GROUP_PREFIX + self.value


BUILTIN: Mapping[ExtensionKind, Mapping[str, str]] = {  # name -> "module:object"
    ExtensionKind.LOSS: {},
    ExtensionKind.SOURCE: {
        "tar": "distill.listing.sources:list_tar",
        "parquet": "distill.listing.sources:list_parquet",
    },
    ExtensionKind.EXPORTER: {
        "hf": "distill.export.to_hf:EXPORTER",
        "timm": "distill.export.to_timm:EXPORTER",
        "meta": "distill.export.to_meta:EXPORTER",
        "onnx": "distill.export.to_onnx:EXPORTER",
        "factory": "distill.export.to_factory:EXPORTER",
    },
    ExtensionKind.LAUNCHER: {
        "local": "distill.launch.local:run_locally",
        "external": "distill.launch.local:run_as_rank",
    },
    ExtensionKind.SINK: {"jsonl": "distill.runfolder.metrics:MetricsWriter"},
    ExtensionKind.KEYS: {},
}


def find(kind: ExtensionKind, name: str, key: str) -> Any:
    """Imports and returns the object of a name; a built-in name cannot be taken by a package.

    Args:
        kind: what is looked for.
        name: as the recipe or the command line has it.
        key: where the name stands, for messages: a dotted key or an option.

    Raises:
        RecipeError: the name is not known, is ambiguous, or cannot be imported.
    """
    return _load(require(kind, name, key), key)


def require(kind: ExtensionKind, name: str, key: str) -> EntryPoint:
    """Returns where the object of a name is, without importing it.

    Raises:
        RecipeError: as ``find``, as far as it shows without importing.
    """
    if name in BUILTIN[kind]:
        return EntryPoint(name, BUILTIN[kind][name], kind.group)
    found = entry_points(group=kind.group, name=name)
    targets = sorted({point.value for point in found})
    if len(targets) > 1:
        raise RecipeError(
            f"{key} = {name}: two installed packages add it ({' and '.join(targets)})",
            fix="Uninstall one of them.",
        )
    if not targets:
        known = names(kind)
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" - did you mean {close[0]!r}?" if close else ""
        raise RecipeError(
            f"{key} = {name}: not known{hint}; known: {', '.join(known) or 'none'}",
            fix=f"Write a known name, or install the package that adds it in the group {kind.group}.",
        )
    return next(point for point in found if point.value == targets[0])


def names(kind: ExtensionKind) -> list[str]:
    """Returns all names of a kind: the built-in ones first, then those of installed packages."""
    added = sorted(point.name for point in entry_points(group=kind.group))
    return list(dict.fromkeys([*BUILTIN[kind], *added]))


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
