"""Runs as tables: what there is in a folder, and what two of them differ in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from distill.report.run_record import RunRecord
from distill.report.sections import differences, number
from distill.runfolder.status import TEACHER
from distill.screen.ending import SUMMARY_LINE
from distill.screen.words import NOTHING, duration

MOST_DEPTH = 3  # folders below the one that is searched


def find_runs(folder: Path) -> list[Path]:
    """Run folders in and below a folder, by name; nothing inside a run is searched."""
    found, level = [], [folder]
    for _ in range(MOST_DEPTH + 1):
        below: list[Path] = []
        for each in level:
            if (each / "job.json").is_file():
                found.append(each)
            else:
                below += (p for p in each.iterdir() if p.is_dir() and not p.name.startswith("."))
        level = below
    return sorted(found)


def row_of(path: Path, run: RunRecord) -> dict[str, Any]:
    """What a list of runs shows of one."""
    status, scores = run.status, {name: run.score(name) for name in [TEACHER, *run.students]}
    line = run.summary.get(SUMMARY_LINE)
    return {
        "run": str(path),
        "state": "not started" if status is None else status.state,
        "done": 0.0 if status is None else status.work_done,
        "started_unix": None if status is None else status.started_unix,
        "s": None if status is None else status.updated_unix - status.started_unix,
        "knn": scores,
        "summary": line.get("text", "") if isinstance(line, Mapping) else "",
        "recipe": run.resolved.get("name", ""),
    }


def runs_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row per run."""
    table = Table(box=None, pad_edge=False)
    for heading in ("run", "state", "done", "time", "k-NN", "summary"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        time = NOTHING if row["s"] is None else duration(row["s"])
        scores = " ".join(f"{n} {number(v)}" for n, v in row["knn"].items() if v is not None)
        cells = row["run"], row["state"], f"{row['done']:.0%}", time, scores or NOTHING
        table.add_row(*cells, row["summary"] or "not computed")
    return table


def comparison(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Keys and scores of runs beside each other: a list per key or score, in the order of the runs."""
    scores: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for run in runs for name in [TEACHER, *run.students]):
        scores[f"{name} k-NN"] = [run.score(name) for run in runs]
        entries = [run.summary.get("students", {}).get(name, {}) for run in runs]
        if name != TEACHER:
            scores[f"{name} last loss"] = [entry.get("loss") for entry in entries]
        found = [_scores_of(run, name) for run in runs]
        for task in dict.fromkeys(task for each in found for task in each):
            values = [each.get(task) for each in found]
            if task != "knn" or [_value(v) for v in values] != scores[f"{name} k-NN"]:
                scores[f"{name} {task}"] = values
    return {
        "runs": [run.name for run in runs],
        "recipe": {key: values for key, *values in differences(runs)},
        "scores": scores,
    }


def _scores_of(run: RunRecord, network: str) -> Mapping[str, Any]:
    scores = run.summary.get("scores")
    found = scores.get(network) if isinstance(scores, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def comparison_tables(found: Mapping[str, Any]) -> list[Table]:
    """Two tables: keys that differ, and scores with the difference to the first run."""
    tables = []
    for title, rows in (("recipe", found["recipe"]), ("scores", found["scores"])):
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for heading in ("", *found["runs"]):
            table.add_column(heading, overflow="fold")
        for key, values in rows.items():
            is_scores = title == "scores"
            table.add_row(key, *(_with_gain(values) if is_scores else map(str, values)))
        if not rows:
            table.add_row("no difference")
        tables.append(table)
    return tables


def _with_gain(values: Sequence[Any]) -> list[str]:
    """Scores as text, each with its difference to the first where both are numbers."""
    plain = [_value(value) for value in values]
    first = plain[0]
    texts = [score_text(value) for value in values]
    for index, value in enumerate(plain[1:], start=1):
        if isinstance(value, int | float) and isinstance(first, int | float):
            texts[index] += f"  {value - first:+.3f}"
    return texts


def _value(entry: Any) -> Any:
    return entry.get("value") if isinstance(entry, Mapping) else entry


def score_text(entry: Any) -> str:
    """A value with its interval."""
    if not isinstance(entry, Mapping):
        return number(entry)
    interval = entry.get("interval")
    if isinstance(interval, list) and len(interval) == 2:
        return f"{number(entry.get('value'))} ({number(interval[0])} to {number(interval[1])})"
    return number(entry.get("value"))
