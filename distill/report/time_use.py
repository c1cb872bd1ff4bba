"""Where the time of a run went: the curves of its rates, each rank's part of a step, the plan beside what was measured."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from distill.report.charts import (
    LEAST_POINTS,
    MOST_POINTS,
    TEACHER_COLOUR,
    USUAL_POINTS,
    Curve,
    bars,
    legend,
    line_chart,
    thinned,
)
from distill.report.markup import Html, element, joined, note, table
from distill.report.run_record import RunRecord
from distill.report.sections import NOT_COMPUTED, dash_of, measured_step_s
from distill.runfolder.metrics import MetricsRow
from distill.runfolder.progress import FIGURES
from distill.runfolder.status import TEACHER
from distill.screen.words import duration

MOST_RANK_ROWS = 40
TEACHING_COLOUR = "#8a8f98"
RATES: Mapping[str, tuple[str, Callable[[MetricsRow], float]]] = {
    "grad_norm": ("norm of the gradient", lambda row: row.grad_norm),
    "lr": ("learning rate", lambda row: row.lr),
    "wait": ("part of the step spent waiting for other ranks", lambda row: row.wait),
    "images_per_s": ("images per second", lambda row: row.images_per_s),
}
LOG_RATES = frozenset({"grad_norm"})

Tracks = list[tuple[str, str, str, list[tuple[float, MetricsRow]]]]  # label, colour, dash, rows


def curves(runs: Sequence[RunRecord], colour_of: Mapping[str, str]) -> Html:
    """Loss, its terms and rates: the students of all runs in the same charts, teachers in training in others."""
    parts = []
    for group, tracks in _tracks(runs, colour_of).items():
        terms = dict.fromkeys(n for *_, rows in tracks for _, row in rows for n in row.terms)
        count = len(tracks) * (1 + len(terms) + len(RATES))
        most = max(LEAST_POINTS, min(USUAL_POINTS, MOST_POINTS // max(1, count)))

        charts = [_chart("loss", tracks, most, lambda row: row.loss)]
        charts += [
            _chart(f"loss term {name}, without its weight", tracks, most, partial(_term, name))
            for name in terms
        ]
        charts += [
            _chart(title, tracks, most, value, may_be_log=name in LOG_RATES)
            for name, (title, value) in RATES.items()
        ]
        parts.append(element("h3", group))
        parts.append(legend([track[:3] for track in tracks]))
        parts.append(element("div", joined(c for c in charts if c), class_="charts"))
    return joined(parts) if parts else note(f"Curves: {NOT_COMPUTED}, no metrics yet.")


def over_steps(runs: Sequence[RunRecord], colour_of: Mapping[str, str]) -> Html:
    """Closeness to the teacher and k-NN of every student over the steps of the family, where it was scored while it trained."""
    tracks = []
    for index, run in enumerate(runs):
        for name in dict.fromkeys(each.student for each in run.progress):
            label = name if len(runs) == 1 else f"{run.name}/{name}"
            look = colour_of.get(name, TEACHER_COLOUR), dash_of(index)
            tracks.append((label, *look, [each for each in run.progress if each.student == name]))
    if not tracks:
        return note("No scores over the steps: evaluate.every computes them while a run trains.")
    charts = []
    for title, value in FIGURES.values():
        found = [
            Curve(
                label,
                colour,
                dash,
                [(each.step, y) for each in rows if (y := value(each)) is not None],
            )
            for label, colour, dash, rows in tracks
        ]
        charts.append(line_chart(title, found, may_be_log=False))
    marks = legend([track[:3] for track in tracks])
    return joined(
        [
            element("h3", "over the steps"),
            marks,
            element("div", joined(c for c in charts if c), class_="charts"),
        ]
    )


def _term(name: str, row: MetricsRow) -> float:
    return row.terms.get(name, math.nan)


def _chart(
    title: str,
    tracks: Tracks,
    most: int,
    value: Callable[[MetricsRow], float],
    *,
    may_be_log: bool = True,
) -> Html | None:
    """One number of all rows, at most ``most`` points of each track."""
    found = []
    for label, colour, dash, rows in tracks:
        points = [(step, value(row)) for step, row in rows]
        finite = [point for point in points if math.isfinite(point[1])]
        found.append(Curve(label, colour, dash, thinned(finite, most)))
    return line_chart(title, found, may_be_log=may_be_log)


def _tracks(runs: Sequence[RunRecord], colour_of: Mapping[str, str]) -> dict[str, Tracks]:
    """The rows of each network over the steps of the phases that train it, those of a teacher and of heads apart from students."""
    groups: dict[str, Tracks] = {}
    for index, run in enumerate(runs):
        left = dict(run.rows)
        for networks in dict.fromkeys(phase.networks for phase in run.phases):
            before, offset, group = {}, 0, "students"
            if networks == (TEACHER,):
                group = TEACHER
            for phase in run.phases:
                if phase.networks == networks:
                    before[phase.name] = offset
                    offset += phase.steps
                    group = phase.name if networks == (phase.name,) else group  # heads
            for name in networks:
                rows = [
                    (float(before[row.phase] + row.step), row)
                    for row in left.pop(name, ())
                    if row.phase in before
                ]
                label = name if len(runs) == 1 else f"{run.name}/{name}"
                look = colour_of.get(name, TEACHER_COLOUR), dash_of(index)
                groups.setdefault(group, []).append((label, *look, rows))
    return {key: tracks for key, tracks in groups.items() if any(t[3] for t in tracks)}


def ranks(run: RunRecord, colour_of: Mapping[str, str]) -> Html:
    """What each rank does in a step as planned: teaching, then its students; the rest it waits."""
    rows = _rank_rows(run, colour_of)
    if not rows:
        return note(f"Time per rank: {NOT_COMPUTED}, plan.json has no times of each part.")
    shown = rows[:MOST_RANK_ROWS]
    more = f" The first {len(shown)} of {len(rows)} rows." if len(rows) > len(shown) else ""
    students = run.plan.get("placements", {})
    entries = [("teaching", TEACHING_COLOUR, "")]
    entries += [(name, colour_of.get(name, TEACHER_COLOUR), "") for name in students]
    text = f"Ranks with equal parts share a row; the light rest of a row is waiting.{more}"
    return joined([legend(entries), bars("time per rank in a step", shown), note(text)])


Parts = tuple[tuple[str, float, str], ...]


def _rank_rows(run: RunRecord, colour_of: Mapping[str, str]) -> list[tuple[str, Parts]]:
    """Ranges of ranks, and the seconds of their parts of a step."""
    plan = run.plan
    try:
        teach_s, image_s = float(plan["teach_s"]), plan["image_s"]
        shares = _written_out(plan["shares"])
        parts: list[list[tuple[str, float, str]]] = [
            [("teaching", teach_s * share, TEACHING_COLOUR)] for share in shares
        ]
        for name, (first, _) in plan["placements"].items():
            for rank, images in enumerate(_written_out(plan["slices"][name]), start=int(first)):
                colour = colour_of.get(name, TEACHER_COLOUR)
                parts[rank].append((name, float(image_s[name]) * images, colour))
    except (KeyError, TypeError, ValueError, IndexError):
        return []
    rows: list[tuple[int, int, Parts]] = []
    for rank, each in enumerate(parts):
        now = tuple((name, float(f"{seconds:.3g}"), colour) for name, seconds, colour in each)
        if rows and rows[-1][2] == now:
            rows[-1] = (rows[-1][0], rank, now)
        else:
            rows.append((rank, rank, now))
    return [(f"rank {a}" if a == b else f"ranks {a}-{b}", each) for a, b, each in rows]


def _written_out(runs: Iterable[Sequence[float]]) -> list[float]:
    return [value for count, value in runs for _ in range(int(count))]


def plan_and_measured(run: RunRecord) -> Html:
    """What the plan promised for the last phase beside what the run measured."""
    plan, status = run.plan, run.status
    if not plan:
        return note(f"Plan: {NOT_COMPUTED}, no plan.json.")
    phase = run.phases[-1].name if run.phases else ""
    planned, measured = plan.get("step_s"), measured_step_s(run, phase)
    batch = plan.get("images_global")
    rows = [["seconds per step", _digits(planned), _digits(measured)]]
    rate = batch / measured if measured and isinstance(batch, int | float) else None
    rows.append(["images per second", _digits(plan.get("images_per_s")), _digits(rate)])
    busy = plan.get("utilisation")
    waits = {
        name: sum(row.wait for row in rows_) / len(rows_)
        for name, all_rows in run.rows.items()
        if (rows_ := [row for row in all_rows if row.phase == phase and math.isfinite(row.wait)])
    }
    waiting = ", ".join(f"{name} {wait:.0%}" for name, wait in waits.items())
    rows.append(["ranks at work", f"{busy:.0%}" if isinstance(busy, float) else "-", "-"])
    rows.append(["waiting for other ranks", "-", waiting or "-"])
    if status is not None:
        rows.append(["waiting for images", "-", f"{status.loader_wait:.1%}"])
    for name, entry in run.times.items():
        if isinstance(entry, Mapping):
            rows.append([f"time of phase {name}", "-", duration(float(entry.get("s", 0.0)))])
    device = plan.get("device", "an unknown device")
    text = f"Planned for {device}, at the rate of its matrix products; the first rank of each network measures its wait."
    notes = [note(str(line)) for line in plan.get("notes", ())]
    return joined([table(("", "planned", "measured"), rows), note(text), *notes])


def _digits(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else "-"
