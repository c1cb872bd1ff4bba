"""The parts of the page, each from what runs hold. What a run has not computed is named, not left out."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import requires
from statistics import median
from typing import Any

from distill.report.charts import DASHES, PALETTE, TEACHER_COLOUR, scatter, value_text
from distill.report.markup import Content, Html, element, facts, joined, note, table
from distill.report.run_record import RunRecord
from distill.runfolder.status import FINAL_STATES, TEACHER
from distill.screen.ending import SUMMARY_LINE
from distill.screen.results import Rows, agreement_rows, cost_rows, task_rows
from distill.screen.tables import BASELINES, unfinished_students
from distill.screen.words import duration

NOT_COMPUTED = "not computed"
MOST_EVENTS, MOST_KEYS, MOST_REMARKS, MOST_TABLE_ROWS = 200, 200, 30, 400
DISTRIBUTION = "distill-family"
FAULT_KEYS = ("skipped", "rolled_back")
Point = tuple[float, float, str]  # value, score, colour


def colours_of(runs: Sequence[RunRecord]) -> dict[str, str]:
    """A colour for each network, the same in all charts and runs."""
    names = dict.fromkeys(name for run in runs for name in run.students if name != TEACHER)
    found = {name: PALETTE[index % len(PALETTE)] for index, name in enumerate(names)}
    return {**found, TEACHER: TEACHER_COLOUR}


def dash_of(index: int) -> str:
    """The dash of a run's curves."""
    return DASHES[index % len(DASHES)]


def conclusions(runs: Sequence[RunRecord]) -> Html:
    """The line that sums each run up, with its state."""
    parts = []
    for run in runs:
        found = run.summary.get(SUMMARY_LINE)
        found = found if isinstance(found, Mapping) else {}
        line = found.get("text") or f"Summary line: {NOT_COMPUTED}"
        parts.append(element("p", element("b", run.name), ": ", str(line), class_="conclusion"))
        for key, label in (("reason", "Why: "), ("next", "Next: ")):
            if found.get(key):
                parts.append(note(label + str(found[key])))
        parts.append(note(state_line(run)))
        parts += [note(line) for line in unfinished_students(run.summary, has_reason=True)]
        parts += [note(f"Could not be read: {problem}") for problem in run.problems]
    return joined(parts)


def state_line(run: RunRecord) -> str:
    """State, progress and time of a run."""
    status = run.status
    if status is None:
        return "No status: the run has not trained yet."
    words = [f"State: {status.state}"]
    if status.state not in FINAL_STATES:
        words.append(f"in progress, {status.phase or 'start'} step {status.step}")
        words.append(f"{status.work_done:.0%} done")
    words.append(f"{duration(status.updated_unix - status.started_unix)} since its start")
    words.append(f"last news {time_text(status.updated_unix)}")
    if status.message:
        words.append(status.message)
    return ", ".join(words) + "."


def time_text(unix: float) -> str:
    """Date and time in UTC."""
    try:
        return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return "unknown time"


def family(run: RunRecord) -> Html:
    """A row per network with k-NN beside what it has to beat, then its scores by task and protocol."""
    shown = "k-NN, balanced accuracy"
    heads = ("network", "parameters", "steps", "last loss", shown, "untrained copy")
    baselines = run.summary.get("baselines", {})
    rows: list[list[Content]] = []
    for name in dict.fromkeys([TEACHER, *run.students]):
        entry = run.summary.get("students", {}).get(name, {})
        loss, untrained = entry.get("loss"), baselines.get("untrained", {}).get(name)
        count = run.parameters.get(name)
        row: list[Content] = [name, "-" if count is None else value_text(count)]
        row += [entry.get("steps", "-"), number(loss), number(run.score(name)), number(untrained)]
        rows.append(row)
    for key, label in BASELINES.items():
        if key in baselines:
            rows.append([f"floor: {label}", "-", "-", "-", number(baselines[key]), ""])
    parts = [table(heads, rows)]
    if not baselines:
        reason = run.summary.get("knn_reason")
        parts.append(note(f"Scores and floors: {NOT_COMPUTED}{f' ({reason})' if reason else ''}."))
    return joined([*parts, _rows_of(task_rows, run.summary, "Scores by task and protocol")])


def _rows_of(
    rows_of: Callable[[Mapping[str, Any]], Rows | None], found: Mapping[str, Any], what: str
) -> Html:
    """A table of the screen on the page; a line where there is none or another version has written it."""
    try:
        rows = rows_of(found)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        return note(f"{what}: cannot be read.")
    if rows is None:
        return note(f"{what}: {NOT_COMPUTED}.")
    cells: list[list[Content]] = [list(row) for row in rows.rows[:MOST_TABLE_ROWS]]
    return joined([note(rows.title), table(rows.headings, cells), *map(note, rows.notes)])


def number(value: Any) -> str:
    """Three decimals, or a dash."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.3f}" if is_number else "-"


def brief(value: Any) -> str:
    """A value of unknown kind in one line."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def agreement(run: RunRecord) -> Html:
    """How near each network's features are to the teacher's, without labels."""
    found = run.summary.get("agreement")
    if isinstance(found, Mapping) and "reason" in found:
        return note(f"Agreement with the teacher: {NOT_COMPUTED} ({found['reason']}).")
    return _rows_of(
        lambda each: agreement_rows(each) if "networks" in each else None,
        found or {},
        "Agreement with the teacher",
    )


def cost(runs: Sequence[RunRecord], colour_of: Mapping[str, str]) -> Html:
    """Score over size and over latency where that was measured, a point per network; the costs and what to take."""
    sizes, times = dict[str, Point](), dict[str, Point]()
    for run in runs:
        for name in [TEACHER, *run.students]:
            score, count = run.score(name), run.parameters.get(name)
            label = name if len(runs) == 1 else f"{run.name}/{name}"
            colour, least_ms = colour_of.get(name, TEACHER_COLOUR), _least_ms(run, name)
            if score is not None and count:
                sizes[label] = float(count), score, colour
            if score is not None and least_ms is not None:
                times[label] = least_ms, score, colour
            for graph, graph_ms, knn in _graphs(run, name):
                times[f"{label}, {graph}"] = graph_ms, knn, colour
    over_size = scatter("k-NN over parameters of the backbone", "parameters", sizes)
    over_time = scatter("k-NN over latency of one image", "ms", times)
    parts = [over_size or note(f"Score over size: {NOT_COMPUTED}, no network has both.")]
    parts += [over_time] if over_time else []
    for run in runs:
        if run.summary.get("cost"):
            parts.append(_rows_of(cost_rows, run.summary, "Cost"))
            parts.append(note(str(run.summary["cost"].get("choice", ""))))
        else:
            parts.append(note(f"Latency: {NOT_COMPUTED}; distill eval {run.name} --tasks cost,knn"))
    return joined(parts)


def _least_ms(run: RunRecord, name: str) -> float | None:
    """The shortest latency of a network of a run."""
    return _least(_cost_of(run, name))


def _cost_of(run: RunRecord, name: str) -> Mapping[str, Any]:
    found = (run.summary.get("cost") or {}).get("networks", {}).get(name, {})
    return found if isinstance(found, Mapping) else {}


def _least(entry: Mapping[str, Any]) -> float | None:
    found = entry.get("latency_ms", {}).values()
    return min((float(each) for each in found if isinstance(each, int | float)), default=None)


def _graphs(run: RunRecord, name: str) -> Iterator[tuple[str, float, float]]:
    """Name, shortest latency and k-NN of each exported graph that has both; in fp32 its k-NN is the network's."""
    found = _cost_of(run, name).get("graphs")
    for graph, entry in found.items() if isinstance(found, Mapping) else ():
        least_ms = _least(entry)
        score = run.score(name) if graph == "onnx" else entry.get("knn")
        if least_ms is not None and isinstance(score, int | float):
            yield graph, least_ms, float(score)


def measured_step_s(run: RunRecord, phase: str) -> float | None:
    """The usual time of a step of a phase: the median over its rows, of any network."""
    batch = run.plan.get("images_global")
    rates = [
        row.images_per_s
        for rows in run.rows.values()
        for row in rows
        if row.phase == phase and row.images_per_s > 0
    ]
    return float(batch) / median(rates) if rates and isinstance(batch, int | float) else None


def data(run: RunRecord) -> Html:
    """Images that the run trained on, and what was passed over."""
    images = run.summary.get("images") or {}
    if not images:
        return note(f"Counts of images: {NOT_COMPUTED} before the end of the run.")
    pairs: list[tuple[str, Content]] = [
        (key.replace("_", " "), f"{images[key]:,}")
        for key in ("train", "held_out", "without_label")
        if isinstance(images.get(key), int)
    ]
    if images.get("passed_over"):
        pairs.append(("passed over", brief(images["passed_over"])))
    if images.get("no_held_out"):
        pairs.append(("nothing held out", str(images["no_held_out"])))
    lines = [*images.get("remarks", ()), *map(str, images.get("lost_classes", ()))]
    return joined([facts(pairs), *(note(str(line)) for line in lines[:MOST_REMARKS])])


def events(run: RunRecord) -> Html:
    """What went wrong or was mended, newest last."""
    parts = []
    networks = run.status.networks if run.status else {}
    faulty = {
        name: entry
        for name, entry in networks.items()
        if entry.skipped or entry.rolled_back or entry.state == "parked"
    }
    if faulty:
        rows: list[list[Content]] = [
            [n, e.state, e.skipped, e.rolled_back] for n, e in faulty.items()
        ]
        parts.append(table(("network", "state", "steps skipped", "rolled back"), rows))
    if run.status and run.status.bad_samples:
        parts.append(note(f"{run.status.bad_samples:,} bad samples, see bad_samples.jsonl."))
    shown = run.events[-MOST_EVENTS:]
    if len(shown) < len(run.events):
        parts.append(note(f"The last {len(shown)} of {len(run.events):,} events:"))
    lines = [[time_text(e.time_unix), e.kind, e.network, brief(e.text)] for e in shown]
    empty = note("No fault and no restart is noted.")
    listed = table(("time", "event", "network", "what happened"), lines) if lines else empty
    return joined([*parts, element("div", listed, class_="texts")])


def differences(runs: Sequence[RunRecord]) -> list[list[str]]:
    """Each key whose value is not the same in all runs: the key, then a value per run."""
    keys = dict.fromkeys(key for run in runs for key in run.resolved)
    rows = [[key, *(run.resolved.get(key, "not there") for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def recipes(runs: Sequence[RunRecord]) -> Html:
    """The recipe of each run as it was given, and the keys in which they differ."""
    parts = []
    if len(runs) > 1:
        rows = differences(runs)
        names = [run.name for run in runs]
        shown = [[brief(text) for text in row] for row in rows[:MOST_KEYS]]
        parts.append(element("h3", f"{len(rows)} keys differ"))
        parts.append(element("div", table(["key", *names], shown), class_="texts"))
        if len(rows) > MOST_KEYS:
            parts.append(note(f"The first {MOST_KEYS}; `distill compare` prints all."))
    for run in runs:
        title = element("summary", f"recipe.yaml of {run.name}, as it was given")
        text = run.recipe or "not there"
        parts.append(element("details", title, element("pre", text), open="open"))
        overrides = run.job.get("request", {}).get("overrides", [])
        if overrides:
            parts.append(note("Values replaced on the command line: " + " ".join(overrides)))
    return joined(parts)


def dependencies() -> list[str]:
    """Names of the packages that distill always installs."""
    needed = requires(DISTRIBUTION) or []
    return [re.split(r"[^\w-]", each)[0] for each in needed if "extra ==" not in each]


def repeat(run: RunRecord) -> Html:
    """The command, versions and machine of a run."""
    request = run.job.get("request", {})
    packages = run.environment.get("packages", {})
    if not isinstance(packages, Mapping):
        packages = {}
    known = [DISTRIBUTION, *dependencies()]
    versions = ", ".join(f"{name} {packages[name]}" for name in known if name in packages)
    ranks = run.plan.get("num_ranks", "?")
    pairs: list[tuple[str, Content]] = [
        ("command", element("code", str(request.get("resume_command", "unknown")))),
        ("seed", run.resolved.get("seed", "unknown")),
        ("images", f"fingerprint {run.job.get('data_fingerprint', 'unknown')}"),
        ("ranks", f"{ranks} on {run.plan.get('device', 'an unknown device')}"),
        ("platform", str(run.environment.get("platform", "unknown"))),
        ("python", str(run.environment.get("python", "unknown"))),
        ("packages", versions or "unknown, see env.json"),
    ]
    text = "Every key with its source stands in recipe.resolved.yaml, every package in env.json."
    return joined([facts(pairs), note(text)])
