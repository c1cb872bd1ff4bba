import io
import os
import threading
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from distill.runfolder.events import Event, note
from distill.runfolder.heartbeat import record_path
from distill.runfolder.metrics import MetricsWriter
from distill.runfolder.status import NetworkStatus, StatusFile, networks_in, write_json
from distill.screen.lines import Narrator
from distill.screen.panel import render_panel
from distill.screen.snapshot import RunFiles, RunSnapshot, silence_s
from distill.screen.tables import scores_table
from distill.screen.watch import watch
from distill.screen.words import clock_time, duration, rank_ranges, sparkline, time_of_day
from tests.support.status import PHASES, ROW, STATUS

NOW = STATUS.updated_unix
SUMMARY = {
    "teacher": {"knn": 0.91},
    "students": {"small": {"knn": 0.88, "loss": 2.5}, "tiny": {"knn": 0.8, "loss": None}},
    "baselines": {"pixels": 0.38, "colour": 0.69, "untrained": {"teacher": 0.6, "small": 0.5}},
}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A family run in its last phase: small has a history, tiny has none yet."""
    folder = tmp_path / "family"
    folder.mkdir()
    with MetricsWriter(folder, "small") as writer:
        for step in range(0, 160, 10):
            writer.write(replace(ROW, phase="family", step=step, loss=8.0 - step / 40))
    StatusFile(folder).write(STATUS)
    return folder


def snapshot_of(folder: Path, **changes: object) -> RunSnapshot:
    taken = RunFiles(folder, clock=lambda: NOW).take_snapshot()
    assert taken.status is not None
    return replace(taken, status=replace(taken.status, **changes))  # type: ignore[arg-type]


def panel_text(snapshot: RunSnapshot, width: int = 100, hint: str = "") -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(render_panel(snapshot, width, hint))
    return file.getvalue()


def test_render_panel__a_row_per_network_and_one_bar(run_folder: Path) -> None:
    text = panel_text(snapshot_of(run_folder), hint="Ctrl-C saves and stops")
    assert "family  2 processes" in text and "Ctrl-C saves and stops" in text
    assert "base ✓  →  gram ✓  →  family step 20 / 200" in text
    assert "73.0%" in text and "(in 1 min 30 s)" in text
    assert "last save: family step 10, 2 s ago" in text
    (small,) = (line for line in text.splitlines() if "small " in line and "▁" in line)
    for cell in ("0-1", "4.250", "█▇▇", "0.400", "10%", "150", "training"):
        assert cell in small
    (tiny,) = (line for line in text.splitlines() if "tiny" in line)
    assert "-  " in tiny and "waiting" in tiny


@pytest.mark.parametrize("width", [50, 70, 100, 160])
def test_render_panel__fits_its_width(run_folder: Path, width: int) -> None:
    lines = panel_text(snapshot_of(run_folder), width).splitlines()
    assert {len(line) for line in lines} == {width}
    assert any("small" in line and "4.250" in line for line in lines)


def test_render_panel__before_the_first_news(tmp_path: Path) -> None:
    assert "waiting for the first news" in panel_text(RunSnapshot("family", None, {}, None, NOW))


def test_render_panel__names_what_went_wrong_and_what_next(run_folder: Path) -> None:
    failed = snapshot_of(
        run_folder,
        state="failed",
        message="student tiny, term ibot, step 20: not finite",
        resume_command="distill train family.yaml",
    )
    text = panel_text(failed)
    assert "student tiny, term ibot, step 20: not finite" in text
    assert "Resume: distill train family.yaml" in text
    assert "failed after 10 s" in text


def test_render_panel__silence_and_skipped_steps_show(run_folder: Path) -> None:
    with MetricsWriter(run_folder, "small") as writer:
        writer.write(replace(ROW, phase="family", step=160, loss=float("nan"), skipped=2))
    text = panel_text(replace(snapshot_of(run_folder), now_unix=NOW + 200))
    assert "2 steps skipped" in text and "nan" in text
    assert "no news for 3 min 20 s: is the job still running?" in text


def test_narrator__each_event_once(run_folder: Path) -> None:
    narrator = Narrator()
    fresh = snapshot_of(
        run_folder, phase="base", step=0, work_done=0.0, last_checkpoint=None, eta_s=None
    )
    (line,) = narrator.lines(fresh)
    assert line.endswith("phase base (1 of 3): 300 steps of teacher")
    assert narrator.lines(fresh) == []
    assert narrator.lines(snapshot_of(run_folder, phase="base", last_checkpoint=None)) != []
    lines = [line[10:] for line in narrator.lines(snapshot_of(run_folder, work_done=0.7))]
    assert lines == [
        "phase family (3 of 3): 200 steps of small, tiny",
        "saved checkpoints/family-10 (family step 10)",
    ]
    exporting = snapshot_of(run_folder, state="exporting", message="student small", work_done=0.7)
    assert [line[10:] for line in narrator.lines(exporting)] == ["exporting: student small"]


def test_narrator__each_line_has_the_time_when_it_happened(run_folder: Path) -> None:
    at = time_of_day
    later = NOW + 3600.0
    note(run_folder, Event("skipped", "small: step 7 skipped", "small", 7))
    taken = replace(snapshot_of(run_folder, state="stopped"), now_unix=later)
    event = replace(taken.events[0], time_unix=1007.0)
    lines = Narrator().lines(replace(taken, events=[event]))
    assert lines == [
        f"{at(1005.0, later)}  phase family (3 of 3): 200 steps of small, tiny",
        f"{at(1007.0, later)}  small: step 7 skipped",
        f"{at(1008.0, later)}  saved checkpoints/family-10 (family step 10)",
        f"{at(NOW, later)}  stopped at family step 20",
    ]
    days = Narrator().lines(replace(taken, now_unix=NOW + 3 * 86400.0, events=[]))
    assert days[-1].startswith(f"{datetime.fromtimestamp(NOW):%a %d %b} ")
    assert Narrator(1007.5).lines(replace(taken, events=[event])) == lines[2:]


def test_silence__not_while_a_rank_lives(run_folder: Path) -> None:
    now = time.time()
    record = record_path(run_folder, 1)
    record.parent.mkdir()
    record.write_text("{}")
    StatusFile(run_folder).write(replace(STATUS, updated_unix=now - 500.0))
    clock = [now]
    files = RunFiles(run_folder, clock=lambda: clock[0])
    assert silence_s(files.take_snapshot()) == 0.0
    clock[0] = now + 50.0
    assert silence_s(files.take_snapshot()) == 0.0
    clock[0] = now + 70.0  # neither status nor heartbeat moved
    assert 69.0 < silence_s(files.take_snapshot()) < 75.0
    os.utime(record, (now + 75.0, now + 75.0))
    clock[0] = now + 76.0  # looked for soon, not at every redraw
    assert silence_s(files.take_snapshot()) > 0.0
    clock[0] = now + 81.0
    assert silence_s(files.take_snapshot()) == 0.0


def test_networks__stop_and_finish_with_their_run(run_folder: Path) -> None:
    both = {"small": NetworkStatus((0,), "training"), "tiny": NetworkStatus((1,), "parked")}
    for state, shown in (("finished", "done"), ("stopped", "stopped"), ("exporting", "done")):
        networks = networks_in(state, both)  # type: ignore[arg-type]
        assert [network.state for network in networks.values()] == [shown, "parked"]
        assert f" {shown}" in panel_text(snapshot_of(run_folder, state=state, networks=networks))
    assert networks_in("training", both) == both
    StatusFile(run_folder).mark_failed("a rank died")
    status = StatusFile(run_folder).read()
    assert status is not None and {n.state for n in status.networks.values()} == {"stopped"}


def test_narrator__progress_by_share_or_by_time(run_folder: Path) -> None:
    narrator = Narrator()
    start = snapshot_of(run_folder, work_done=0.70)
    narrator.lines(start)

    def told(work_done: float, after_s: float) -> list[str]:
        moved = snapshot_of(run_folder, work_done=work_done, updated_unix=NOW + after_s)
        return narrator.lines(replace(moved, now_unix=NOW + after_s))

    assert told(0.75, 5.0) == []
    assert len(told(0.81, 6.0)) == 1
    assert told(0.82, 20.0) == []
    (line,) = told(0.83, 22.0)
    assert "family step 20/200, 83% of the run, loss small 4.250, 0.0 images/s, ends" in line
    assert told(0.83, 50.0) == []


def test_narrator__long_runs_speak_less_often(run_folder: Path) -> None:
    narrator = Narrator()
    day_s = 86_400.0
    first = snapshot_of(run_folder, work_done=0.1, updated_unix=NOW + day_s)
    narrator.lines(replace(first, now_unix=NOW + day_s))
    soon = snapshot_of(run_folder, work_done=0.11, updated_unix=NOW + day_s + 600)
    assert narrator.lines(replace(soon, now_unix=NOW + day_s + 600)) == []
    late = snapshot_of(run_folder, work_done=0.12, updated_unix=NOW + day_s + 1800)
    assert len(narrator.lines(replace(late, now_unix=NOW + day_s + 1800))) == 1


def test_watch__plain_has_one_line_per_event_and_no_escape_codes(run_folder: Path) -> None:
    write_json(run_folder / "summary.json", SUMMARY)
    StatusFile(run_folder).write(replace(STATUS, state="finished", work_done=1.0))
    file = io.StringIO()
    console = Console(file=file, force_terminal=False, width=40)
    last = watch(run_folder, live=True, console=console, stop=threading.Event())
    assert last is not None and last.state == "finished"
    *stamped, folder, other, first, second, third, ended = file.getvalue().splitlines()
    lines = [line.split("  ", 1)[1] for line in (*stamped, ended)]
    assert folder == f"small is in {run_folder}/students/small"
    assert other.startswith("tiny is in ")
    assert all(line.startswith("next: distill ") for line in (first, second, third))
    assert "\x1b" not in file.getvalue()
    assert lines[-6:] == [
        "k-NN teacher: 0.910 (untrained 0.600)",
        "k-NN small: 0.880 (untrained 0.500)",
        "k-NN tiny: 0.800 (untrained -)",
        "k-NN raw pixels: 0.380",
        "k-NN colour mean and spread: 0.690",
        "finished after 10 s",
    ]


def test_watch__plain_on_a_terminal_is_plain_too(run_folder: Path) -> None:
    StatusFile(run_folder).write(
        replace(STATUS, state="stopped", resume_command="distill train family.yaml")
    )
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="truecolor")
    watch(run_folder, live=False, console=console, stop=threading.Event())
    assert "\x1b" not in file.getvalue()
    assert "stopped at family step 20" in file.getvalue()
    assert file.getvalue().endswith("resume with: distill train family.yaml\n")


def test_watch__live_ends_with_the_scores(run_folder: Path) -> None:
    write_json(run_folder / "summary.json", SUMMARY)
    StatusFile(run_folder).write(replace(STATUS, state="finished", work_done=1.0))
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, color_system=None)
    watch(run_folder, live=True, console=console, stop=threading.Event())
    assert "finished after 10 s" in file.getvalue()
    assert "+0.380" in file.getvalue()


@pytest.mark.parametrize("live", [True, False])
def test_watch__stop_ends_a_run_without_news(tmp_path: Path, live: bool) -> None:
    stop = threading.Event()
    timer = threading.Timer(0.1, stop.set)
    timer.start()
    console = Console(file=io.StringIO(), force_terminal=True)
    assert watch(tmp_path, live=live, console=console, stop=stop) is None
    timer.join()


def test_watch__an_earlier_attempt_is_no_news(run_folder: Path) -> None:
    StatusFile(run_folder).write(replace(STATUS, state="stopped"))
    stop = threading.Event()
    stop.set()
    console = Console(file=io.StringIO())
    last = watch(run_folder, live=False, console=console, stop=stop, since_unix=NOW + 1)
    assert last is None


def test_scores_table__gives_gain_over_untrained() -> None:
    file = io.StringIO()
    Console(file=file, width=100).print(scores_table(SUMMARY))
    (small,) = (line for line in file.getvalue().splitlines() if "small" in line)
    assert [cell.strip() for cell in small.split("│")[1:-1]] == [
        "small",
        "0.880",
        "0.500",
        "+0.380",
        "2.500",
    ]


def test_scores_table__says_why_there_are_none() -> None:
    file = io.StringIO()
    table = scores_table({"teacher": {"knn": None}, "knn_reason": "no class folders"})
    Console(file=file, width=100).print(table)
    assert "no class folders" in file.getvalue()


def test_sparkline__shows_the_trend() -> None:
    assert sparkline([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([float(value) for value in range(100)], 4) == "▁▃▆█"
    assert sparkline([1.0, float("nan"), 2.0], 16) == "▁█"
    assert sparkline([3.0] * 5, 16) == "▄▄▄▄▄"
    assert sparkline([float("nan")], 16) == ""


def test_rank_ranges__joins_neighbours() -> None:
    assert rank_ranges([0]) == "0"
    assert rank_ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert rank_ranges([]) == ""


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (185.0, "3 min 05 s"),
        (3725.0, "1 h 02 min"),
        (12 * 86400.0 + 20 * 3600, "12 d 20 h"),
        (-3.0, "0 s"),
    ],
)
def test_duration__two_largest_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_clock_time__date_only_when_far() -> None:
    assert len(clock_time(NOW + 3600, NOW)) == len("14:20")
    assert len(clock_time(NOW + 3 * 86400, NOW)) == len("Sun 06 Dec 14:20")


def test_phases__are_the_ones_the_status_names() -> None:
    assert STATUS.phases == PHASES


def test_events__are_told_once_and_shown_on_the_panel(run_folder: Path) -> None:
    narrator = Narrator()
    narrator.lines(snapshot_of(run_folder))
    note(
        run_folder, Event("skipped", "small: step 7 skipped, a gradient is not finite", "small", 7)
    )
    (line,) = narrator.lines(snapshot_of(run_folder))
    assert line.endswith("small: step 7 skipped, a gradient is not finite")
    assert narrator.lines(snapshot_of(run_folder)) == []
    assert "a gradient is not finite" in panel_text(snapshot_of(run_folder))
    later = RunFiles(run_folder, since_unix=2.0 * time.time()).take_snapshot()
    assert not later.events


def test_render_panel__says_who_was_rolled_back(run_folder: Path) -> None:
    networks = {
        name: replace(network, state="training", rolled_back=2)
        for name, network in STATUS.networks.items()
    }
    assert "rolled back 2x" in panel_text(snapshot_of(run_folder, networks=networks))
