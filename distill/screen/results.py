"""What was got, for people: closeness to the teacher first, scores by task, and the conclusion in words."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.screen.tables import BASELINES, scores_table
from distill.screen.words import NOTHING

KINDS, UNTRAINED = ("class", "patch"), "  untrained"
MEASURES = {"mutual_knn": "k-NN", "cka": "CKA", "cosine": "cosine"}
TITLES = {
    "knn": "k-NN",
    "logistic": "logistic regression",
    "fewshot": "few-shot",
    "linear": "linear probe",
    "retrieval": "retrieval",
    "seg": "seg, mIoU",
    "depth": "depth, RMSE m",
    "correspondence": "PCK@0.1",
}
SCORE_HEADINGS = (
    "task",
    "protocol",
    "network",
    "score",
    "95% interval",
    "untrained",
    "chosen",
)


def print_results(console: Console, summary: Mapping[str, Any]) -> None:
    """Every table of ``summary.json``, and its conclusion."""
    print_agreement(console, summary)
    console.print(scores_table(summary))
    if (table := tasks_table(summary)) is not None:
        console.print(table)
    if (costs := cost_rows(summary)) is not None:
        console.print(_plain_table(costs, text_columns=1))
        console.print(Text(summary["cost"]["choice"]), soft_wrap=True)
    for line in conclusion_lines(summary):
        console.print(Text(line), soft_wrap=True)


def print_agreement(console: Console, summary: Mapping[str, Any]) -> None:
    """The table of closeness to the teacher, or why there is none."""
    agreement = summary.get("agreement") or {}
    if "networks" in agreement:
        console.print(agreement_table(agreement))
    elif "reason" in agreement:
        console.print(f"no agreement: {agreement['reason']}", markup=False, soft_wrap=True)


class Rows(NamedTuple):
    """A table as text, for a terminal and for the page of a run; ``num_networks`` rows come before those of floors."""

    title: str
    headings: tuple[str, ...]
    rows: list[list[str]]
    num_networks: int
    notes: list[str]


def agreement_rows(agreement: Mapping[str, Any]) -> Rows:
    """A row per network, for class and patch features, with its untrained copy and raw pixels as floors."""
    part = {"held_out": "held-out images", "train": "training images"}.get(
        agreement["part"], agreement["part"]
    )
    rows = []
    for name, entry in agreement["networks"].items():
        rows += [[name, *_cells(entry)], [UNTRAINED, *_cells(entry["untrained"])]]
    floors = [
        [BASELINES.get(name, name), *_cells(each)] for name, each in agreement["floors"].items()
    ]
    figures = [f"{kind} {each}" for kind in KINDS for each in (*MEASURES.values(), "rank")]
    return Rows(
        f"agreement with {agreement['reference']} on {agreement['images']:,} {part}, no labels",
        ("network", *figures),
        [*rows, *floors],
        len(rows),
        [
            f"k-NN: share of the {agreement['k']} nearest images in common, {agreement['chance']:.3f} by chance; "
            "cosine: after the best linear map, on the other half of the images; rank: directions in use"
        ],
    )


def agreement_table(agreement: Mapping[str, Any]) -> Table:
    """Returns ``agreement_rows`` for a terminal."""
    found = agreement_rows(agreement)
    table = _titled(found)
    table.add_column("network")
    for heading in found.headings[1:]:
        table.add_column(heading.replace(" ", "\n", 1), justify="right")
    for index, row in enumerate(found.rows):
        if index == found.num_networks:
            table.add_section()
        is_floor = index >= found.num_networks or row[0] == UNTRAINED
        table.add_row(*row, style="dim" if is_floor else "")
    return table


def _titled(rows: Rows) -> Table:
    notes = "\n".join(rows.notes)
    return Table(title=rows.title, title_justify="left", caption=notes, caption_justify="left")


def cost_rows(summary: Mapping[str, Any]) -> Rows | None:
    """A row per network: size, work, and time on the machine that is named; None where it was not measured."""
    cost = summary.get("cost")
    if not cost:
        return None
    entries = cost["networks"]
    rows, notes = list[list[str]](), list[str]()
    measured = [
        each for entry in entries.values() for each in (entry, *entry.get("graphs", {}).values())
    ]
    timed = list(dict.fromkeys(key for each in measured for key in each["latency_ms"]))
    for name, entry in entries.items():
        facts = [f"{entry['parameters']:,}", f"{entry['gflop']:.3g}"]
        rows.append([name, *facts, *_times(entry, timed)])
        for graph, each in entry.get("graphs", {}).items():
            rows.append([f"  {graph}", NOTHING, NOTHING, *_times(each, timed)])
            if each["reason"]:
                notes.append(f"{name}, {graph}: not timed ({each['reason']})")
    headings = ("network", "parameters", "GFLOP", "MB", *(f"ms, {key}" for key in timed))
    sizes = ", ".join(sorted({f"{each['size']} px" for each in entries.values()}))
    how = f"one image of {sizes}, median; images/s in batches of {cost['batch']}; decoding not included"
    if any(entry.get("graphs") for entry in entries.values()):
        how += "; onnx: by onnxruntime on the CPU, MB of the file"
    title = f"cost on {cost['device']}"
    return Rows(title, (*headings, "images/s"), rows, len(rows), [how, *notes])


def _times(entry: Mapping[str, Any], timed: list[str]) -> list[str]:
    """Megabytes, latencies and throughput of a network or a graph."""
    latency = (_figure(entry["latency_ms"].get(key)) for key in timed)
    return [f"{entry['megabytes']:.3g}", *latency, _figure(entry["images_per_s"])]


def _figure(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _plain_table(found: Rows, text_columns: int) -> Table:
    """Rows as a table, figures to the right."""
    table = _titled(found)
    for index, heading in enumerate(found.headings):
        table.add_column(heading, justify="left" if index < text_columns else "right")
    for row in found.rows:
        table.add_row(*row)
    return table


def agreement_lines(summary: Mapping[str, Any]) -> list[str]:
    """Mutual k-NN of the class features of every network with the teacher, a line each, beside its floors."""
    agreement = summary.get("agreement") or {}
    if "networks" not in agreement:
        return []
    reference, floors = agreement["reference"], agreement["floors"]
    beside = ", ".join(
        f"{BASELINES.get(name, name)} {entry['class']['mutual_knn']:.3f}"
        for name, entry in floors.items()
    )
    return [
        f"agreement of {name} with {reference}: {entry['class']['mutual_knn']:.3f} of nearest neighbours "
        f"(untrained {entry['untrained']['class']['mutual_knn']:.3f}, {beside})"
        for name, entry in agreement["networks"].items()
        if name != reference
    ]


def _cells(entry: Mapping[str, Any]) -> list[str]:
    cells = []
    for kind in KINDS:
        figures = entry.get(kind, {})
        cells += [f"{figures[key]:.3f}" if key in figures else NOTHING for key in MEASURES]
        rank = figures.get("effective_rank")
        cells.append(NOTHING if rank is None else f"{rank:.1f}")
    return cells


def task_rows(summary: Mapping[str, Any]) -> Rows | None:
    """A row per network and task, with the protocol's name and the interval; None where no task was computed.

    Settings that all networks share are below the table, a line per task; those that differ stand in the row.
    """
    by_task: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, entries in (summary.get("scores") or {}).items():
        for task, entry in entries.items():
            by_task.setdefault(task, {})[name] = entry
    if not by_task:
        return None
    shared = {
        task: _shared([entry.get("settings", {}) for entry in entries.values()])
        for task, entries in by_task.items()
    }
    notes = [f"{TITLES.get(t, t)}: {_settings_text(each)}" for t, each in shared.items() if each]
    rows = [
        [TITLES.get(task, task), *_score_cells(name, entry, shared[task])]
        for task, entries in by_task.items()
        for name, entry in entries.items()
    ]
    title = "scores with 95% intervals over held-out images or draws"
    return Rows(title, SCORE_HEADINGS, rows, len(rows), notes)


def tasks_table(summary: Mapping[str, Any]) -> Table | None:
    """Returns ``task_rows`` for a terminal."""
    found = task_rows(summary)
    if found is None:
        return None
    table = _titled(found)
    for heading in found.headings:
        is_figure = heading in {"score", "95% interval", "untrained"}
        table.add_column(
            heading,
            justify="right" if is_figure else "left",
            overflow="fold" if heading == "chosen" else "ellipsis",
        )
    for row in found.rows:
        table.add_row(*row)
    return table


def _score_cells(name: str, entry: Mapping[str, Any], shared: Mapping[str, Any]) -> list[str]:
    if "reason" in entry:
        return [NOTHING, name, NOTHING, NOTHING, NOTHING, str(entry["reason"])]
    interval, untrained = entry.get("interval"), entry.get("untrained")
    chosen = {key: value for key, value in entry.get("settings", {}).items() if key not in shared}
    return [
        str(entry.get("protocol", NOTHING)),
        name,
        f"{entry['value']:.3f}",
        NOTHING if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}",
        NOTHING if untrained is None else f"{untrained:.3f}",
        _settings_text(chosen),
    ]


def _shared(settings: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings that are the same for all networks that have some."""
    given = [each for each in settings if each]
    first = given[0] if given else {}
    return {key: value for key, value in first.items() if all(e.get(key) == value for e in given)}


def _settings_text(settings: Mapping[str, Any]) -> str:
    """In one line; figures by k or by shots are in ``summary.json`` only."""
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in settings.items()
        if not isinstance(value, dict)
    )


def conclusion_lines(summary: Mapping[str, Any]) -> list[str]:
    """The conclusion, its reason and the next move, a line each; none where there is no conclusion."""
    found = summary.get("conclusion")
    if not found:
        return []
    lines = [str(found.get("text", ""))]
    lines += [f"  why:  {found['reason']}"] if found.get("reason") else []
    return lines + ([f"  next: {found['next']}"] if found.get("next") else [])
