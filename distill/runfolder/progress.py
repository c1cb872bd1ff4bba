"""``students-progress.json``: how near each student was to its teacher after so many steps, over the run.

The process that scores beside training (``evaluate.every``) and ``distill eval RUN --over-steps`` both write it: a row of
the same step and student replaces the earlier one, all others stay, also where their checkpoint is gone. Replaced as one file, so
that readers find all students of a step or none.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.runfolder.status import write_json

FILE = "students-progress.json"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class ScoredStep:
    """What a screen, a page and a tracker show of a student after ``step`` steps of the family; ``knn`` is None without labels."""

    student: str
    step: int
    knn: float | None
    class_knn: float
    patch_knn: float
    cka: float


# What is plotted, by the name that a tracker gets: its title, and the number itself
FIGURES: Mapping[str, tuple[str, Callable[[ScoredStep], float | None]]] = {
    "class_neighbours": (
        "neighbours shared with the teacher, class features",
        lambda s: s.class_knn,
    ),
    "patch_neighbours": (
        "neighbours shared with the teacher, patch features",
        lambda s: s.patch_knn,
    ),
    "class_cka": ("CKA with the teacher, class features", lambda s: s.cka),
    "knn": ("k-NN of held-out images, balanced accuracy", lambda s: s.knn),
}


def read_progress(run_folder: Path) -> list[ScoredStep]:
    """Every row by step; one that is damaged is passed over, a run does not stop for its scores."""
    found = []
    for row in _rows(run_folder):
        with suppress(KeyError, TypeError, ValueError):
            near = [row["class_token"]["mutual_knn"], row["patch"]["mutual_knn"]]
            near.append(row["class_token"]["cka"])
            knn = None if row["knn"] is None else float(row["knn"])
            found.append(ScoredStep(str(row["student"]), int(row["step"]), knn, *map(float, near)))
    return found


def add_progress(run_folder: Path, rows: Iterable[Row]) -> None:
    """Adds rows; each has ``student`` and ``step``."""
    known = {_key(row): row for row in [*_rows(run_folder), *rows]}
    _write(run_folder, [known[key] for key in sorted(known, key=lambda key: key[0])])


def cut_progress(run_folder: Path, step: int) -> None:
    """Removes rows after ``step``, the newest from which a run can go on: their weights are trained anew."""
    rows = _rows(run_folder)
    left = [row for row in rows if _key(row)[0] <= step]
    if len(left) < len(rows):
        _write(run_folder, left)


def _key(row: Row) -> tuple[int, str]:
    return int(row["step"]), str(row["student"])


def _write(run_folder: Path, rows: Sequence[Row]) -> None:
    write_json(run_folder / FILE, rows)


def _rows(run_folder: Path) -> list[Row]:
    """The rows whose step and student are known; none where the file is not there or damaged."""
    rows: list[Row] = []
    with suppress(OSError, ValueError, TypeError):
        for row in json.loads((run_folder / FILE).read_text(encoding="utf-8")):
            with suppress(KeyError, TypeError, ValueError):
                _key(row)
                rows.append(row)
    return rows
