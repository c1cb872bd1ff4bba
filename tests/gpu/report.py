"""Rows of a run: what JSON they become, whether that is well formed, and the table that people read."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tests.gpu.clock import Figures

FORMAT = 1
State = Literal["ok", "failed", "not run", "not here"]
STATES = ("ok", "failed", "not run", "not here")
MOST_IN_A_CELL = 100  # letters of figures in the table; the JSON has all


@dataclass(frozen=True)
class Row:
    """One check. ``not run``: time or the device was gone; ``not here``: this machine cannot make the check."""

    name: str
    state: State
    seconds: float
    share_s: float
    figures: Figures = field(default_factory=dict)
    error: str = ""


def to_text(head: dict[str, Any], rows: Sequence[Row]) -> str:
    """The JSON of a run so far.

    Raises:
        ValueError: a figure is not finite.
        TypeError: a figure is no plain data.
    """
    report = {"format": FORMAT, **head, "rows": [asdict(row) for row in rows]}
    return json.dumps(report, indent=1, allow_nan=False) + "\n"


def problems_of(report: Any) -> list[str]:
    """What is wrong with a report that was read back; nothing for a sound one."""
    if not isinstance(report, dict):
        return ["the report is no object"]
    kinds = {"format": int, "device": str, "sizes": str, "budget_s": (int, float), "rows": list}
    found = [
        f"{key} is missing or of another type"
        for key, kind in kinds.items()
        if not isinstance(report.get(key), kind)
    ]
    columns = {"name": str, "state": str, "seconds": (int, float), "share_s": (int, float)}
    columns |= {"figures": dict, "error": str}
    for index, row in enumerate(report.get("rows") or []):
        wrong = [key for key, kind in columns.items() if not isinstance(row.get(key), kind)]
        found += [f"rows[{index}].{key} is missing or of another type" for key in wrong]
        if row.get("state") not in STATES:
            found.append(f"rows[{index}].state = {row.get('state')!r}")
        elif bool(row.get("error")) == (row["state"] == "ok"):
            found.append(f"rows[{index}]: an error if, and only if, it is not ok")
    return found


def table(rows: Sequence[Row]) -> str:
    """One line for each check, and the count of each state."""
    names = max((len(row.name) for row in rows), default=0)
    lines = [
        f"{row.name:{names}}  {row.state:8}  {row.seconds:6.1f} s of {row.share_s:4.0f}  {_cell(row)}"
        for row in rows
    ]
    counts = {state: sum(row.state == state for row in rows) for state in STATES}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return "\n".join([*lines, told or "no checks"]) + "\n"


def _cell(row: Row) -> str:
    text = row.error or ", ".join(f"{name} {_short(value)}" for name, value in row.figures.items())
    text = " ".join(text.split())
    return text if len(text) <= MOST_IN_A_CELL else text[: MOST_IN_A_CELL - 3] + "..."


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(each)}" for key, each in value.items()) + "}"
    return str(value)
