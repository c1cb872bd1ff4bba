"""What was got, for people: closeness to the teacher first, scores by task, and the conclusion in words."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distill.screen.tables import BASELINES, scores_table
from distill.screen.words import NOTHING

MEASURES = {"mutual_knn": "k-NN", "cka": "CKA", "cosine": "cosine"}
TITLES = {
    "knn": "k-NN",
    "logistic": "logistic regression",
    "fewshot": "few-shot",
    "linear": "linear probe",
    "retrieval": "retrieval",
}


def print_results(console: Console, summary: Mapping[str, Any]) -> None:
    """Every table of ``summary.json``, and its conclusion."""
    agreement = summary.get("agreement") or {}
    if "networks" in agreement:
        console.print(agreement_table(agreement))
    elif "reason" in agreement:
        console.print(f"no agreement: {agreement['reason']}", markup=False, soft_wrap=True)
    console.print(scores_table(summary))
    if (table := tasks_table(summary)) is not None:
        console.print(table)
    for line in conclusion_lines(summary):
        console.print(Text(line), soft_wrap=True)


def agreement_table(agreement: Mapping[str, Any]) -> Table:
    """A row per network, for class and patch features, with its untrained copy and raw pixels as floors."""
    reference = agreement["reference"]
    part = {"held_out": "held-out", "train": "training"}.get(agreement["part"], agreement["part"])
    table = Table(
        title=f"agreement with {reference} on {agreement['images']:,} {part} images, no labels",
        title_justify="left",
        caption=f"k-NN: share of the {agreement['k']} nearest images in common, {agreement['chance']:.3f} by chance; "
        "cosine: after the best linear map, on the other half of the images; rank: directions in use",
        caption_justify="left",
    )
    table.add_column("network")
    for kind in ("class", "patch"):
        for heading in (*MEASURES.values(), "rank"):
            table.add_column(f"{kind}\n{heading}", justify="right")
    for name, entry in agreement["networks"].items():
        table.add_row(name, *_cells(entry))
        table.add_row("  untrained", *_cells(entry["untrained"]), style="dim")
    table.add_section()
    for name, entry in agreement["floors"].items():
        table.add_row(BASELINES.get(name, name), *_cells(entry), style="dim")
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
    for kind in ("class", "patch"):
        figures = entry.get(kind, {})
        cells += [f"{figures[key]:.3f}" if key in figures else NOTHING for key in MEASURES]
        rank = figures.get("effective_rank")
        cells.append(NOTHING if rank is None else f"{rank:.1f}")
    return cells


def tasks_table(summary: Mapping[str, Any]) -> Table | None:
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
    table = Table(
        title="scores with 95% intervals over held-out images or draws",
        title_justify="left",
        caption="\n".join(notes),
        caption_justify="left",
    )
    for heading in ("task", "protocol", "network"):
        table.add_column(heading)
    for heading in ("score", "95% interval", "untrained"):
        table.add_column(heading, justify="right")
    table.add_column("chosen", overflow="fold")
    for task, entries in by_task.items():
        for name, entry in entries.items():
            table.add_row(TITLES.get(task, task), *_score_cells(name, entry, shared[task]))
    return table


def _score_cells(name: str, entry: Mapping[str, Any], shared: Mapping[str, Any]) -> list[str]:
    if "reason" in entry:
        return [NOTHING, name, NOTHING, NOTHING, NOTHING, str(entry["reason"])]
    interval, untrained = entry.get("interval"), entry.get("untrained")
    chosen = {key: value for key, value in entry["settings"].items() if key not in shared}
    return [
        entry["protocol"],
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
    return [found["text"], f"  why:  {found['reason']}", f"  next: {found['next']}"]
