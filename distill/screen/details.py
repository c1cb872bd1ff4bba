"""What a large screen shows below the table of networks: curves of the loss, loss terms and rates, scores so far.

Each part is left out, from the last one on, where the screen has no lines for it: a panel that is higher than the
screen would leave its upper part behind at every drawing.
"""

import io
import math
from collections.abc import Sequence
from statistics import fmean

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distill.runfolder.metrics import MetricsRow
from distill.runfolder.progress import ScoredStep
from distill.runfolder.status import FINAL_STATES
from distill.screen.console import make_console
from distill.screen.snapshot import RunSnapshot
from distill.screen.words import BARS, duration, number_text, sparkline, steps_text

CURVE_LINES = 6
MOST_CURVES = 4  # side by side: a curve has at least 25 columns
MOST_TERMS = 6
TREND_CELLS = 20


def details(snapshot: RunSnapshot, width: int, num_free: int) -> list[RenderableType]:
    """As many parts as have room in ``num_free`` lines, each below an empty line and its heading."""
    found: list[RenderableType] = []
    for heading, part in (
        ("scores so far", _scores(snapshot)),
        ("loss terms, without their weights", _terms(snapshot)),
        (_curve_heading(snapshot), _curves(snapshot, width)),
    ):
        if part is None:
            continue
        parts: list[RenderableType] = [
            Text(),
            Text(heading, style="bold", no_wrap=True, overflow="ellipsis"),
            part,
        ]
        lines = num_lines(parts, width)
        if lines <= num_free:
            num_free -= lines
            found[:0] = parts
    return found


def num_lines(parts: Sequence[RenderableType], width: int) -> int:
    """How many lines parts take on a screen."""
    console = make_console(file=io.StringIO(), width=width)
    return len(console.render_lines(Group(*parts), pad=False))


def _rows_of_phase(snapshot: RunSnapshot) -> dict[str, list[MetricsRow]]:
    """The rows of each network in the phase that runs."""
    phase = snapshot.status.phase if snapshot.status else ""
    found = {
        name: [row for row in rows if row.phase == phase] for name, rows in snapshot.rows.items()
    }
    return {name: rows for name, rows in found.items() if rows}


def _curve_heading(snapshot: RunSnapshot) -> str:
    status = snapshot.status
    assert status is not None, "details are of a run with a status"
    end = status.updated_unix if status.state in FINAL_STATES else snapshot.now_unix
    return f"loss over the steps of {status.phase}, {duration(end - status.started_unix)} since the start"


def _curves(snapshot: RunSnapshot, width: int) -> Table | None:
    """A curve for each network, side by side, with its highest and lowest value."""
    found = {
        name: [row.loss for row in rows if math.isfinite(row.loss)]
        for name, rows in _rows_of_phase(snapshot).items()
    }
    found = {name: losses for name, losses in found.items() if losses}
    shown = list(found)[:MOST_CURVES]
    if not shown:
        return None
    cells = width // len(shown) - 3
    grid = Table.grid(padding=(0, 3, 0, 0))
    for _ in shown:
        grid.add_column(width=cells, no_wrap=True, overflow="ellipsis")
    grid.add_row(*shown)
    curves = [tall_curve(found[name], cells - 9, CURVE_LINES) for name in shown]
    for line in range(CURVE_LINES):
        row = []
        for name, curve in zip(shown, curves, strict=True):
            edge = {0: max, CURVE_LINES - 1: min}.get(line)
            label = number_text(edge(found[name])) if edge else ""
            row.append(Text(f"{label:>7} ").append(curve[line], style="cyan"))
        grid.add_row(*row)
    if len(found) > MOST_CURVES:
        grid.add_row(Text(f"and {len(found) - MOST_CURVES} more", style="dim"))
    return grid


def tall_curve(values: Sequence[float], num_cells: int, num_lines: int) -> list[str]:
    """Lines from the top: columns of bars for the means of equal runs of ``values``, the lowest with one eighth of a line."""
    cells = min(num_cells, len(values))
    edges = [index * len(values) // cells for index in range(cells + 1)]
    means = [fmean(values[edges[index] : edges[index + 1]]) for index in range(cells)]
    low, spread = min(means), max(means) - min(means)
    steps = num_lines * len(BARS) - 1
    levels = [
        1 + (round((mean - low) / spread * steps) if spread else steps // 2) for mean in means
    ]
    lines = []
    for line in reversed(range(num_lines)):
        filled = [min(len(BARS), max(0, level - line * len(BARS))) for level in levels]
        lines.append("".join(f" {BARS}"[count] for count in filled))
    return lines


def _terms(snapshot: RunSnapshot) -> Table | None:
    """The last terms of the loss of each network, and its learning rate."""
    rows = {name: found[-1] for name, found in _rows_of_phase(snapshot).items()}
    names = list(dict.fromkeys(name for row in rows.values() for name in row.terms))[:MOST_TERMS]
    if not names:
        return None
    table = _table("network", *names, "learning rate", "step")
    for network, row in rows.items():
        values = [number_text(row.terms[name]) if name in row.terms else "-" for name in names]
        table.add_row(network, *values, f"{row.lr:.2e}", steps_text(row.step))
    return table


def _scores(snapshot: RunSnapshot) -> Table | None:
    """The last scores of each student, and how the neighbours that it shares with the teacher changed."""
    found: dict[str, list[ScoredStep]] = {}
    for each in snapshot.scores:
        found.setdefault(each.student, []).append(each)
    if not found:
        return None
    table = _table(
        "network", "step", "class neighbours", "patch neighbours", "CKA", "k-NN", "trend"
    )
    for name, history in found.items():
        last = history[-1]
        knn = "-" if last.knn is None else f"{last.knn:.3f}"
        trend = Text(sparkline([each.class_knn for each in history], TREND_CELLS), style="cyan")
        numbers = [f"{value:.3f}" for value in (last.class_knn, last.patch_knn, last.cka)]
        table.add_row(name, steps_text(last.step), *numbers, knn, trend)
    return table


def _table(first: str, *headings: str) -> Table:
    table = Table(
        box=None, pad_edge=False, header_style="dim", show_edge=False, padding=(0, 3, 0, 0)
    )
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
