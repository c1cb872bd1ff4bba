"""The live panel of a run: where it is, how it does, a row per network."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distill.runfolder.metrics import MetricsRow
from distill.runfolder.status import FINAL_STATES, NetworkStatus, Status
from distill.screen.details import details, num_lines
from distill.screen.snapshot import RunSnapshot, silence_s
from distill.screen.words import (
    NOTHING,
    clock_time,
    count_text,
    duration,
    number_text,
    rank_ranges,
    rate_text,
    sparkline,
    steps_text,
    time_of_day,
)

SHOWN_EVENTS = 3  # the latest, on the panel
TREND_CELLS = 16
STATE_STYLES = {
    "training": "green",
    "waiting": "yellow",
    "done": "cyan",
    "stopped": "yellow",
    "parked": "dim",
}
WIDE, TALL = 120, 40  # columns and lines from which on curves, loss terms and scores are shown
NARROW = 84  # columns below which trend and ranks are left out


def render_panel(snapshot: RunSnapshot, width: int, hint: str = "", height: int = 24) -> Panel:
    """The run as a panel ``width`` columns wide: where it is, how it does, a row per network; on a large screen curves and scores too."""
    status = snapshot.status
    if status is None:
        body: RenderableType = Text("waiting for the first news of this run", style="dim")
        return Panel(body, title=Text(snapshot.name, style="bold"), title_align="left", width=width)
    num_ranks = len({rank for network in status.networks.values() for rank in network.ranks})
    title = Text(f" {snapshot.name} ", style="bold")
    if num_ranks:
        title.append(f" {count_text(num_ranks, 'process', 'processes')} ", style="not bold dim")
    parts = [_where(status, width - 4)]
    if status.phase:
        parts += [_progress(status, snapshot.now_unix, width - 4), _health(snapshot)]
    parts += _notices(snapshot)
    if status.networks:
        parts += [Text(), _network_table(snapshot, width)]
        if width >= WIDE and height >= TALL:
            parts += details(
                snapshot, width - 4, height - num_lines(parts, width - 4) - 3
            )  # frame, cursor
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
            steps = f"{steps_text(status.step)} / {steps_text(status.phases[index].steps)}"
            left.append(name, style="bold cyan").append(f" step {steps}", style="default")
        else:
            left.append(name, style="dim")
    right = Text(no_wrap=True)
    if status.step_s is not None and status.state not in FINAL_STATES:
        right.append(f"  {status.step_s:.3g} s/step   {rate_text(status.images_per_s)} images/s")
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


def _health(snapshot: RunSnapshot) -> Text:
    """What slows the run down, and what would survive a crash now."""
    status = snapshot.status
    assert status is not None, "the panel of a run without a status has no health line"
    is_done = status.state in FINAL_STATES
    facts = [] if is_done else [f"loader wait {status.loader_wait:.1%}"]
    trained = [
        (rows[-1].wait, name)
        for name, rows in snapshot.rows.items()
        if rows and rows[-1].phase == status.phase and status.networks[name].state == "training"
    ]
    if len(trained) > 1 and not is_done:
        facts.append(f"slowest: {min(trained)[1]}")
    if status.bad_samples:
        facts.append(f"{status.bad_samples:,} bad samples")
    if status.last_checkpoint is None:
        facts.append("nothing saved yet")
    else:
        saved = status.last_checkpoint
        ago = duration(snapshot.now_unix - saved.saved_unix)
        facts.append(f"last save: {saved.phase} step {steps_text(saved.step)}, {ago} ago")
    return Text("   ".join(facts), style="dim", no_wrap=True, overflow="ellipsis")


def _notices(snapshot: RunSnapshot) -> list[Text]:
    status = snapshot.status
    assert status is not None, "the panel of a run without a status has no notices"
    notices = []
    if status.message:
        style = "bold red" if status.state == "failed" else "italic"
        notices.append(Text(status.message, style=style))
    if status.state in {"stopped", "failed"} and status.resume_command:
        notices.append(Text(f"Resume: {status.resume_command}", style="bold"))
    notices += [
        Text(f"{time_of_day(event.time_unix, snapshot.now_unix)}  {event.text}", style="yellow")
        for event in snapshot.events[-SHOWN_EVENTS:]
    ]
    quiet_s = silence_s(snapshot)
    if quiet_s:
        notices.append(
            Text(f"no news for {duration(quiet_s)}: is the job still running?", style="yellow")
        )
    return notices


def _network_table(snapshot: RunSnapshot, width: int) -> Table:
    status, is_narrow = snapshot.status, width < NARROW
    has_memory = width >= WIDE and any(snapshot.memory.values())
    assert status is not None, "the panel of a run without a status has no networks"
    table = Table(box=None, expand=True, pad_edge=False, header_style="dim", show_edge=False)
    table.add_column("network", no_wrap=True, ratio=3)
    if not is_narrow:
        table.add_column("ranks", justify="right", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    if not is_narrow:
        table.add_column("trend", no_wrap=True, min_width=TREND_CELLS)
    for heading in ("grad", "wait", "images/s", *(["memory"] if has_memory else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True, ratio=3)
    for name, network in status.networks.items():
        rows = snapshot.rows[name]
        cells = _network_cells(name, network, rows)
        if has_memory:
            most = max(snapshot.memory.get(rank, 0) for rank in network.ranks)
            cells.insert(-1, f"{most / 2**30:.1f} GiB" if most else NOTHING)
        if is_narrow:
            del cells[3], cells[1]
        table.add_row(*cells, style="dim" if network.state in {"parked", "done", "stopped"} else "")
    return table


def _network_cells(
    name: str, network: NetworkStatus, rows: Sequence[MetricsRow]
) -> list[RenderableType]:
    state = Text(network.state, style=STATE_STYLES.get(network.state, ""))
    if not rows:
        return [name, rank_ranges(network.ranks), NOTHING, "", NOTHING, NOTHING, NOTHING, state]
    last = rows[-1]
    if network.rolled_back and network.state == "training":
        state = Text(f"rolled back {network.rolled_back}x", style="bold red")
    if last.skipped and network.state == "training":
        state = Text(f"{count_text(last.skipped, 'step', 'steps')} skipped", style="bold red")
    losses = [row.loss for row in rows if row.phase == last.phase]
    return [
        name,
        rank_ranges(network.ranks),
        number_text(last.loss),
        Text(sparkline(losses, TREND_CELLS), style="cyan"),
        number_text(last.grad_norm),
        f"{last.wait:.0%}",
        rate_text(last.images_per_s),
        state,
    ]


def _spread(left: RenderableType, right: RenderableType, width: int) -> Table:
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_column(justify="right", no_wrap=True)
    grid.width = width
    grid.add_row(left, right)
    return grid
