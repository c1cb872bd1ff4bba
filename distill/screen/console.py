"""The screen of a run: a live panel on a terminal, one plain line per event anywhere else.

Reads ``status.json``, ``events.jsonl`` and ``metrics/*.jsonl`` (and the scores of a finished run) and nothing else.
So the same screen serves the process that trains, a second terminal, and a run that ended long ago.

    take_snapshot -> render_panel              live: redrawn a few times a second
                  -> Narrator.tell             plain: only what is new since the last snapshot

Colours and escape codes are left to rich, which honours NO_COLOR and writes none to a file.
The file is long because panel, lines and score table share their words and change together.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distill.runfolder.events import Event, read_events
from distill.runfolder.metrics import (
    FINAL_STATES,
    MetricsReader,
    MetricsRow,
    NetworkStatus,
    Status,
    StatusFile,
)

if TYPE_CHECKING:
    from distill.plan.flops import Device
    from distill.plan.job import JobPlan
    from distill.plan.memory import Needs
    from distill.plan.plan import Plan
    from distill.weights.load import Inspection

REFRESH_S = 0.25  # of the live panel and of looking for events
PROGRESS_FRACTION = 0.1  # a plain progress line at least this often ...
PROGRESS_S = 15.0  # ... or after this time, stretched to 2 % of the elapsed time on long runs
SILENCE_S = 60.0  # without a new status (and ten steps' time) the job may be gone
SHOWN_EVENTS = 3  # the latest, on the panel
TREND_CELLS = 16
BARS = "▁▂▃▄▅▆▇█"
STATE_STYLES = {"training": "green", "waiting": "yellow", "done": "cyan", "parked": "dim"}
NARROW = 84  # columns below which trend and ranks are left out
NOTHING = "-"


@dataclass(frozen=True)
class Snapshot:
    """What the files said at one moment; ``rows`` has every network of the status."""

    name: str
    status: Status | None
    rows: Mapping[str, Sequence[MetricsRow]]
    summary: Mapping[str, Any] | None
    now_unix: float
    events: Sequence[Event] = ()


class RunFiles:
    """Follows the files of one run folder, reading each history only once."""

    def __init__(
        self, run_folder: Path, *, since_unix: float = 0.0, clock: Callable[[], float] = time.time
    ) -> None:
        """Name the folder; no file need exist yet. A status from before ``since_unix`` is none."""
        self._folder = run_folder
        self._since_unix = since_unix
        self._clock = clock
        self._status_file = StatusFile(run_folder)
        self._readers: dict[str, MetricsReader] = {}

    def take_snapshot(self) -> Snapshot:
        """The run as its files describe it now."""
        status = self._status_file.read()
        if status is not None and status.updated_unix < self._since_unix:
            status = None
        for name in status.networks if status else ():
            reader = self._readers.setdefault(name, MetricsReader(self._folder, name))
            reader.poll()
        return Snapshot(
            name=self._folder.name,
            status=status,
            rows={name: reader.rows for name, reader in self._readers.items()},
            summary=self._read_summary() if status and status.state == "finished" else None,
            now_unix=self._clock(),
            events=read_events(self._folder, since_unix=self._since_unix),
        )

    def _read_summary(self) -> Mapping[str, Any] | None:
        path = self._folder / "summary.json"
        if not path.exists():
            return None
        summary: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return summary


def watch(
    run_folder: Path,
    *,
    live: bool,
    console: Console,
    stop: threading.Event,
    hint: str = "",
    since_unix: float = 0.0,
) -> Status | None:
    """The last status seen, after showing the run until it ends or ``stop`` is set.

    ``live`` asks for the panel; without a terminal the plain lines are written all the same.
    ``hint`` is shown under the panel (what Ctrl-C does here). A launcher gives its own start as
    ``since_unix``: the end of an earlier attempt in the same folder is then not taken for its own.
    """
    files = RunFiles(run_folder, since_unix=since_unix)
    if live and console.is_terminal and not console.is_dumb_terminal:
        return _watch_live(files, console, stop, hint)
    return _watch_plain(files, console, stop)


def _watch_live(
    files: RunFiles, console: Console, stop: threading.Event, hint: str
) -> Status | None:
    snapshot = files.take_snapshot()
    with Live(
        render_panel(snapshot, console.width, hint),
        console=console,
        auto_refresh=False,
        transient=False,
    ) as screen:
        while not _is_over(snapshot) and not stop.wait(REFRESH_S):
            snapshot = files.take_snapshot()
            screen.update(render_panel(snapshot, console.width, hint), refresh=True)
        snapshot = files.take_snapshot()
        screen.update(render_panel(snapshot, console.width, hint=""), refresh=True)
    if snapshot.summary is not None:
        console.print(scores_table(snapshot.summary))
    return snapshot.status


def _watch_plain(files: RunFiles, console: Console, stop: threading.Event) -> Status | None:
    narrator = Narrator()
    while True:
        is_last = stop.is_set()
        snapshot = files.take_snapshot()
        for line in narrator.tell(snapshot):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if is_last or _is_over(snapshot):
            return snapshot.status
        stop.wait(REFRESH_S)


def _is_over(snapshot: Snapshot) -> bool:
    return snapshot.status is not None and snapshot.status.state in FINAL_STATES


# Live ------------------------------------------------------------------------------------------


def render_panel(snapshot: Snapshot, width: int, hint: str = "") -> Panel:
    """The run as a panel ``width`` columns wide: where it is, how it does, a row per network."""
    status = snapshot.status
    if status is None:
        body: RenderableType = Text("waiting for the first news of this run", style="dim")
        return Panel(body, title=f"[bold]{snapshot.name}", title_align="left", width=width)
    num_ranks = len({rank for network in status.networks.values() for rank in network.ranks})
    title = Text(f" {snapshot.name} ", style="bold")
    if num_ranks:
        title.append(f" {_count(num_ranks, 'process', 'processes')} ", style="not bold dim")
    parts = [_where(status, width - 4)]
    if status.phase:
        parts += [_progress(status, snapshot.now_unix, width - 4), _health(snapshot)]
    parts += _notices(snapshot)
    if status.networks:
        parts += [Text(), _network_table(snapshot, is_narrow=width < NARROW)]
    return Panel(
        Group(*parts),
        title=title,
        title_align="left",
        subtitle=Text(f" {hint} ", style="dim") if hint else None,
        width=width,
        border_style="red" if status.state == "failed" else "blue",
    )


def _where(status: Status, width: int) -> RenderableType:
    """State, phases and speed: one line, the speed to the right; only this phase when narrow."""
    left = Text(no_wrap=True, overflow="ellipsis")
    left.append(status.state, style="bold red" if status.state == "failed" else "bold")
    names = [phase.name for phase in status.phases]
    current = names.index(status.phase) if status.phase in names else -1
    for index, name in enumerate(names):
        if width < NARROW and index != current:
            continue
        left.append("   " if left.plain == status.state else "  →  ", style="dim")
        if index < current or status.state == "finished":
            left.append(f"{name} ✓", style="green")
        elif index == current:
            steps = f"{_steps(status.step)} / {_steps(status.phases[index].steps)}"
            left.append(name, style="bold cyan").append(f" step {steps}", style="default")
        else:
            left.append(name, style="dim")
    right = Text(no_wrap=True)
    if status.step_s is not None and status.state not in FINAL_STATES:
        right.append(f"  {status.step_s:.3g} s/step   {_rate(status.images_per_s)} images/s")
    return _spread(left, right, width)


def _progress(status: Status, now_unix: float, width: int) -> RenderableType:
    """The overall bar with elapsed and remaining time."""
    if status.state in FINAL_STATES:
        words = f"{status.state} after {duration(status.updated_unix - status.started_unix)}"
    elif status.eta_s is None:
        words = f"{duration(now_unix - status.started_unix)} so far"
    else:
        words = f"ends {clock_time(now_unix + status.eta_s, now_unix)}"
        words += f" (in {duration(status.eta_s)})"
    right = Text(f" {status.work_done:6.1%}   {words}", no_wrap=True)
    bar = ProgressBar(
        total=1.0, completed=status.work_done, width=max(8, width - right.cell_len - 1)
    )
    return _spread(bar, right, width)


def _health(snapshot: Snapshot) -> Text:
    """What slows the run down, and what would survive a crash now."""
    status = snapshot.status
    assert status is not None, "the panel of a run without a status has no health line"
    is_over = status.state in FINAL_STATES
    facts = [] if is_over else [f"loader wait {status.loader_wait:.1%}"]
    trained = [
        (rows[-1].wait, name)
        for name, rows in snapshot.rows.items()
        if rows and rows[-1].phase == status.phase and status.networks[name].state == "training"
    ]
    if len(trained) > 1 and not is_over:
        facts.append(f"slowest: {min(trained)[1]}")
    if status.bad_samples:
        facts.append(f"{status.bad_samples:,} bad samples")
    if status.last_checkpoint is None:
        facts.append("nothing saved yet")
    else:
        saved = status.last_checkpoint
        ago = duration(snapshot.now_unix - saved.saved_unix)
        facts.append(f"last save: {saved.phase} step {_steps(saved.step)}, {ago} ago")
    return Text("   ".join(facts), style="dim", no_wrap=True, overflow="ellipsis")


def _notices(snapshot: Snapshot) -> list[Text]:
    status = snapshot.status
    assert status is not None, "the panel of a run without a status has no notices"
    notices = []
    if status.message:
        style = "bold red" if status.state == "failed" else "italic"
        notices.append(Text(status.message, style=style))
    if status.state in {"stopped", "failed"} and status.resume_command:
        notices.append(Text(f"Resume: {status.resume_command}", style="bold"))
    notices += [
        Text(f"{_time_of_day(event.time_unix)}  {event.text}", style="yellow")
        for event in snapshot.events[-SHOWN_EVENTS:]
    ]
    silence_s = _silence_s(snapshot)
    if silence_s:
        notices.append(
            Text(f"no news for {duration(silence_s)}: is the job still running?", style="yellow")
        )
    return notices


def _network_table(snapshot: Snapshot, *, is_narrow: bool) -> Table:
    status = snapshot.status
    assert status is not None, "the panel of a run without a status has no networks"
    table = Table(box=None, expand=True, pad_edge=False, header_style="dim", show_edge=False)
    table.add_column("network", no_wrap=True, ratio=3)
    if not is_narrow:
        table.add_column("ranks", justify="right", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    if not is_narrow:
        table.add_column("trend", no_wrap=True, min_width=TREND_CELLS)
    for heading in ("grad", "wait", "images/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True, ratio=3)
    for name, network in status.networks.items():
        rows = snapshot.rows[name]
        cells = _network_cells(name, network, rows)
        if is_narrow:
            del cells[3], cells[1]
        table.add_row(*cells, style="dim" if network.state in {"parked", "done"} else "")
    return table


def _network_cells(
    name: str, network: NetworkStatus, rows: Sequence[MetricsRow]
) -> list[RenderableType]:
    state = Text(network.state, style=STATE_STYLES[network.state])
    if not rows:
        return [name, rank_ranges(network.ranks), NOTHING, "", NOTHING, NOTHING, NOTHING, state]
    last = rows[-1]
    if network.rolled_back and network.state == "training":
        state = Text(f"rolled back {network.rolled_back}x", style="bold red")
    if last.skipped and network.state == "training":
        state = Text(f"{_count(last.skipped, 'step', 'steps')} skipped", style="bold red")
    losses = [row.loss for row in rows if row.phase == last.phase]
    return [
        name,
        rank_ranges(network.ranks),
        _number(last.loss),
        Text(sparkline(losses, TREND_CELLS), style="cyan"),
        _number(last.grad_norm),
        f"{last.wait:.0%}",
        _rate(last.images_per_s),
        state,
    ]


def _spread(left: RenderableType, right: RenderableType, width: int) -> Table:
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_column(justify="right", no_wrap=True)
    grid.width = width
    grid.add_row(left, right)
    return grid


# Plain -----------------------------------------------------------------------------------------


class Narrator:
    """Turns snapshots into lines, each event once."""

    def __init__(self) -> None:
        """Nothing has been told."""
        self._status: Status | None = None
        self._told_work = 0.0
        self._told_unix = -math.inf
        self._has_told_silence = False
        self._num_events = 0

    def tell(self, snapshot: Snapshot) -> list[str]:
        """The lines for what happened since the last snapshot, oldest first."""
        before, now = self._status, snapshot.status
        fresh = snapshot.events[self._num_events :]
        self._num_events += len(fresh)
        events = [event.text for event in fresh]
        if now is None:
            return _stamped(events, snapshot.now_unix)
        if now.last_checkpoint and (
            before is None or before.last_checkpoint != now.last_checkpoint
        ):
            saved = now.last_checkpoint
            events.append(f"saved {saved.path} ({saved.phase} step {saved.step})")
        if now.phase and (before is None or before.phase != now.phase):
            events.append(_phase_line(now))
            self._told_work, self._told_unix = now.work_done, snapshot.now_unix
        if now.bad_samples and (before is None or before.bad_samples < now.bad_samples):
            events.append(f"{now.bad_samples:,} bad samples so far, named in bad_samples.jsonl")
        if self._is_progress_due(snapshot):
            events.append(_progress_line(snapshot))
            self._told_work, self._told_unix = now.work_done, snapshot.now_unix
        if before is None or (before.state, before.message) != (now.state, now.message):
            events.extend(_state_lines(before, snapshot))
        silence_s = _silence_s(snapshot)
        if silence_s and not self._has_told_silence:
            events.append(f"no news for {duration(silence_s)}: is the job still running?")
        self._has_told_silence = bool(silence_s)
        self._status = now
        return _stamped(events, snapshot.now_unix)

    def _is_progress_due(self, snapshot: Snapshot) -> bool:
        now = snapshot.status
        assert now is not None, "progress of a run without a status"
        if now.state != "training" or now.work_done <= self._told_work:
            return False
        gap_s = max(PROGRESS_S, 0.02 * (snapshot.now_unix - now.started_unix))
        return (
            now.work_done - self._told_work >= PROGRESS_FRACTION
            or snapshot.now_unix - self._told_unix >= gap_s
        )


def _stamped(events: Sequence[str], now_unix: float) -> list[str]:
    return [f"{_time_of_day(now_unix)}  {event}" for event in events]


def _time_of_day(unix: float) -> str:
    return datetime.fromtimestamp(unix).strftime("%H:%M:%S")


def _phase_line(status: Status) -> str:
    names = [phase.name for phase in status.phases]
    index = names.index(status.phase)
    phase = status.phases[index]
    who = ", ".join(phase.networks)
    return f"phase {phase.name} ({index + 1} of {len(names)}): {phase.steps} steps of {who}"


def _progress_line(snapshot: Snapshot) -> str:
    status = snapshot.status
    assert status is not None, "progress of a run without a status"
    steps = next(phase.steps for phase in status.phases if phase.name == status.phase)
    facts = [f"{status.phase} step {status.step}/{steps}", f"{status.work_done:.0%} of the run"]
    losses = [
        f"{name} {_number(rows[-1].loss)}"
        for name, rows in snapshot.rows.items()
        if rows and rows[-1].phase == status.phase
    ]
    if losses:
        facts.append(f"loss {' '.join(losses)}")
    facts.append(f"{_rate(status.images_per_s)} images/s")
    if status.eta_s is not None:
        end = clock_time(snapshot.now_unix + status.eta_s, snapshot.now_unix)
        facts.append(f"ends {end} (in {duration(status.eta_s)})")
    return ", ".join(facts)


def _state_lines(before: Status | None, snapshot: Snapshot) -> list[str]:
    now = snapshot.status
    assert now is not None, "state of a run without a status"
    lines = []
    if now.state == "finished":
        lines += _score_lines(snapshot.summary) if snapshot.summary else []
        lines.append(f"finished after {duration(now.updated_unix - now.started_unix)}")
    elif now.state in FINAL_STATES:
        lines.append(f"{now.state} at {now.phase or 'the start'} step {now.step}")
    elif now.state not in {"training", "saving"} and not now.message:
        lines.append(now.state)
    if now.message and (before is None or before.message != now.message):
        lines.append(f"{now.state}: {now.message}" if now.state != "training" else now.message)
    if now.state in {"stopped", "failed"} and now.resume_command:
        lines.append(f"resume with: {now.resume_command}")
    return lines


def _score_lines(summary: Mapping[str, Any]) -> list[str]:
    lines = [
        f"k-NN {name}: {_score(knn)} (untrained {_score(untrained)})"
        for name, knn, untrained, _ in _scores(summary)
    ]
    baselines = summary.get("baselines", {})
    lines += [
        f"k-NN {label}: {_score(baselines[key])}"
        for key, label in BASELINES.items()
        if key in baselines
    ]
    if summary.get("knn_reason"):
        lines.append(f"no k-NN scores: {summary['knn_reason']}")
    return lines


# Scores ----------------------------------------------------------------------------------------

BASELINES = {"pixels": "raw pixels", "colour": "colour mean and spread"}


def scores_table(summary: Mapping[str, Any]) -> Table:
    """The scores of ``summary.json``: a row per network beside its untrained copy, then baselines.

    A run whose images have no labels has no scores; the caption then gives the reason.
    """
    table = Table(title="k-NN on held-out images, balanced accuracy", title_justify="left")
    table.add_column("network")
    for heading in ("k-NN", "untrained", "gain", "loss"):
        table.add_column(heading, justify="right")
    for name, knn, untrained, loss in _scores(summary):
        gain = NOTHING if knn is None or untrained is None else f"{knn - untrained:+.3f}"
        cells = [_score(knn), _score(untrained), gain, NOTHING if loss is None else _number(loss)]
        table.add_row(name, *cells)
    table.add_section()
    baselines = summary.get("baselines", {})
    for key, label in BASELINES.items():
        if key in baselines:
            table.add_row(label, _score(baselines[key]), "", "", "", style="dim")
    if summary.get("knn_reason"):
        table.caption = str(summary["knn_reason"])
    return table


Score = float | None


def _scores(summary: Mapping[str, Any]) -> list[tuple[str, Score, Score, Score]]:
    """Name, score, untrained score and loss of the teacher and each student."""
    networks = {"teacher": summary["teacher"]} if "teacher" in summary else {}
    networks.update(summary.get("students", {}))
    untrained = summary.get("baselines", {}).get("untrained", {})
    return [
        (name, entry.get("knn"), untrained.get(name), entry.get("loss"))
        for name, entry in networks.items()
    ]


def _score(value: Score) -> str:
    return NOTHING if value is None else f"{value:.3f}"


# Words -----------------------------------------------------------------------------------------


def sparkline(values: Sequence[float], num_cells: int) -> str:
    """At most ``num_cells`` bars for the means of equal runs of ``values``, lowest to highest.

    Values that are not finite are left out; a flat line is drawn in the middle.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    cells = min(num_cells, len(finite))
    edges = [index * len(finite) // cells for index in range(cells + 1)]
    means = [fmean(finite[edges[index] : edges[index + 1]]) for index in range(cells)]
    low, high = min(means), max(means)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # rounding, not a trend
        return BARS[3] * cells
    return "".join(BARS[round((mean - low) / (high - low) * (len(BARS) - 1))] for mean in means)


def rank_ranges(ranks: Sequence[int]) -> str:
    """Ranks as short ranges: ``0-3,8``."""
    ranges: list[list[int]] = []
    for world_rank in sorted(ranks):
        if ranges and world_rank == ranges[-1][-1] + 1:
            ranges[-1][1:] = [world_rank]
        else:
            ranges.append([world_rank])
    return ",".join("-".join(str(edge) for edge in entry) for entry in ranges)


def duration(seconds: float) -> str:
    """A length of time in its two largest units: ``12 d 20 h``, ``3 min 05 s``, ``8 s``."""
    total = max(0, round(seconds))
    minutes, rest_s = divmod(total, 60)
    hours, rest_minutes = divmod(minutes, 60)
    days, rest_hours = divmod(hours, 24)
    if days:
        return f"{days} d {rest_hours} h"
    if hours:
        return f"{hours} h {rest_minutes:02d} min"
    if minutes:
        return f"{minutes} min {rest_s:02d} s"
    return f"{rest_s} s"


def clock_time(unix: float, now_unix: float) -> str:
    """The local time of day, with the date when it is not within the next twelve hours."""
    moment = datetime.fromtimestamp(unix)
    is_far = abs(moment - datetime.fromtimestamp(now_unix)) > timedelta(hours=12)
    return moment.strftime("%a %d %b %H:%M") if is_far else moment.strftime("%H:%M")


def _silence_s(snapshot: Snapshot) -> float:
    """Seconds without news when that is long enough to say so, else 0."""
    status = snapshot.status
    if status is None or status.state in FINAL_STATES:
        return 0.0
    silence_s = snapshot.now_unix - status.updated_unix
    return silence_s if silence_s > max(SILENCE_S, 10 * (status.step_s or 0.0)) else 0.0


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _steps(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{_steps(round(value))}"


def plan_tables(job: "JobPlan", device: "Device") -> list[Table]:
    """Placement, slices, shares and seconds of a plan, a row per network and one for the teaching; then what it needs."""
    plan = job.plan
    busy = f"busy {plan.utilisation:.0%} (even shares and a barrier: {plan.utilisation_even_barrier:.0%})"
    table = Table(
        title=f"{job.name}: {plan.num_ranks} ranks, {plan.images_global} images a step, {busy}",
        title_justify="left",
    )
    for column in ("network", "ranks", "images per rank", "seconds per rank", "GiB at most"):
        table.add_column(column)

    def gib(ranks: range) -> str:
        return f"{max(job.needs.memory[rank].total for rank in ranks):.1f}"

    for placement, image_s in zip(plan.placements, plan.image_s, strict=True):
        ranks = placement.world_ranks
        shown = str(ranks.start) if len(ranks) == 1 else f"{ranks.start}-{ranks.stop - 1}"
        seconds = image_s * placement.largest_slice
        row = placement.name, shown, _sizes(placement.slices), f"{seconds:.3g}"
        table.add_row(*row, gib(ranks))
    low, high = (plan.teach_s * each(plan.mean_shares) for each in (min, max))
    spread = f"{low:.3g} to {high:.3g}" if high > low else f"{low:.3g}"
    row = "teaching", f"0-{plan.num_ranks - 1}", _shares(plan), spread
    table.add_row(*row, gib(range(plan.num_ranks)))
    if plan.notes:
        table.caption, table.caption_justify = "; ".join(plan.notes), "left"
    facts = Table(show_header=False, box=None, padding=(0, 2))
    rate = plan.images_global / plan.step_s
    days = job.seconds / 86_400
    length = f"{days:.1f} days" if days >= 1 else duration(days * 86_400)
    facts.add_row(
        "speed",
        f"{plan.step_s:.3g} s a step, {rate:,.0f} images/s, {length} for {job.num_steps:,} steps, if "
        f"{device.name} reaches {device.efficiency:.0%} of {device.tflops_per_s:.3g} TFLOP/s",
    )
    if len(plan.placements) > 1:
        facts.add_row(
            "gain", f"{plan.gain:.2f}x over separate jobs, of at most {plan.gain_bound:.2f}x"
        )
    _add_needs(facts, job.needs)
    return [table, facts]


def _add_needs(facts: Table, needs: "Needs") -> None:
    memory = needs.fullest
    parts = ", ".join(
        f"{name} {value:.1f}" for name, value in asdict(memory).items() if value >= 0.05
    )
    facts.add_row("memory", f"{memory.total:.1f} GiB on the fullest rank ({parts})")
    if not needs.gathered_bytes:
        return
    most = max(needs.sliced_bytes) / 1e6
    facts.add_row(
        "exchange",
        f"at most {most:,.1f} MB to a rank per step; everything to everybody: {needs.gathered_bytes / 1e6:,.0f} MB",
    )


def inspection_table(found: "Inspection") -> Table:
    """What a file of weights is."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    what = found.what if found.arch is None else f"{found.what}, {found.arch}"
    table.add_row("file", found.path)
    table.add_row("is", f"{what} ({found.layout} layout)" if found.layout else what)
    if found.released is not None:
        table.add_row("name says", f"the released {found.released}")
    size = f"{found.num_bytes / 1e6:,.1f} MB, {', '.join(found.dtypes)}"
    table.add_row("holds", f"{found.parameters:,} numbers in {found.tensors} tensors, {size}")
    if found.has_nan is not None:
        table.add_row("values", "some are not finite" if found.has_nan else "all finite")
    for note in found.notes:
        table.add_row("note", note)
    return table


MOST_RUNS = 6  # of equal numbers that are written out


def _sizes(parts: Sequence[range]) -> str:
    """Sizes of ranges, runs of equal ones counted: ``2 x 32, 17``."""
    return _runs([len(part) for part in parts])


def _shares(plan: "Plan") -> str:
    """Images each rank teaches per step, on average where they change from step to step."""
    return _runs([round(share, 1) for share in plan.mean_shares])


def _runs(values: Sequence[float]) -> str:
    """Numbers with runs of equal ones counted; their range where there are too many runs."""
    runs = [(len(list(run)), value) for value, run in groupby(values)]
    if len(runs) > MOST_RUNS:
        return f"{min(values):g} to {max(values):g}, mean {sum(values) / len(values):.1f}"
    return ", ".join(f"{count} x {size:g}" if count > 1 else f"{size:g}" for count, size in runs)
