"""The panel on a large screen: curves, loss terms and scores, never higher or wider than the screen."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from distill.runfolder.heartbeat import publish_records
from distill.runfolder.progress import ScoredStep
from distill.runfolder.status import NetworkStatus, StatusFile
from distill.screen.details import tall_curve
from distill.screen.panel import render_panel
from distill.screen.snapshot import LOOK_EVERY_S, RunFiles, RunSnapshot
from tests.support.status import ROW, SIGN, STATUS


def snapshot_of(num_students: int, num_scored: int = 3) -> RunSnapshot:
    """A family in training, each loss falling; students are scored every 50 steps."""
    names = [f"student-{index}" for index in range(num_students)]
    rows = {
        name: [
            replace(ROW, phase="family", step=step, loss=8.0 - step / 40)
            for step in range(0, 160, 2)
        ]
        for name in names
    }
    scores = [
        ScoredStep(name, 50 * turn, 0.5 + turn / 10, 0.25 * turn, 0.125 * turn, 0.9)
        for turn in range(1, num_scored + 1)
        for name in names
    ]
    networks = {name: NetworkStatus((index,), "training") for index, name in enumerate(names)}
    status = replace(STATUS, networks=networks)
    return RunSnapshot("mine", status, rows, None, STATUS.updated_unix, scores=scores)


def lines_of(snapshot: RunSnapshot, width: int, height: int) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, height=height, color_system=None)
    console.print(render_panel(snapshot, width, "Ctrl-C saves and stops", height))
    return file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "height"), [(120, 40), (160, 50), (237, 65)])
def test_panel__on_a_large_screen_curves_terms_and_scores(width: int, height: int) -> None:
    lines = lines_of(snapshot_of(3), width, height)
    assert {len(line) for line in lines} == {width} and len(lines) < height
    text = "\n".join(lines)
    assert "loss over the steps of family, 10 s since the start" in text
    curves = [line for line in lines if line.count("  8.000 ") == 3 or line.count("  4.050 ") == 3]
    assert len(curves) == 2, "the highest and lowest loss of each, side by side"
    (heads,) = (line for line in lines if "ibot" in line)
    assert heads.split()[1:-1] == ["network", "dino", "ibot", "koleo", "learning", "rate", "step"]
    (scored,) = (line for line in lines if "0.750" in line and "student-1" in line)
    assert scored.split()[2:-2] == ["150", "0.750", "0.375", "0.900", "0.800"]


def test_panel__on_a_large_screen_the_memory_of_the_fullest_rank_of_a_network() -> None:
    snapshot = replace(snapshot_of(2), memory={0: 3 << 30, 1: 0})
    networks = dict(snapshot.status.networks) if snapshot.status else {}
    networks["student-0"] = NetworkStatus((0, 2), "training")
    assert snapshot.status is not None
    snapshot = replace(snapshot, status=replace(snapshot.status, networks=networks))
    (heading,) = (line for line in lines_of(snapshot, 120, 40) if "images/s  " in line)
    assert heading.split()[-3:-1] == ["memory", "state"]
    row = next(line for line in lines_of(snapshot, 120, 40) if line.startswith("│ student-0  "))
    assert row.split()[-4:-1] == ["3.0", "GiB", "training"]
    assert not any("memory" in line for line in lines_of(snapshot, 119, 40))
    assert not any("memory" in line for line in lines_of(snapshot_of(2), 120, 40)), "of older runs"


def test_run_files__have_the_memory_of_a_job_at_work(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").mkdir()
    StatusFile(tmp_path).write(STATUS)
    now = [1000.0]
    files = RunFiles(tmp_path, clock=lambda: now[0])
    publish_records(tmp_path, [replace(SIGN, memory_bytes=5)])
    assert files.take_snapshot().memory == {0: 5}
    publish_records(tmp_path, [replace(SIGN, memory_bytes=6)])
    assert files.take_snapshot().memory == {0: 5}, "heartbeats are read now and then"
    now[0] += LOOK_EVERY_S
    assert files.take_snapshot().memory == {0: 6}


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 39), (119, 60)])
def test_panel__on_a_small_screen_only_the_table(width: int, height: int) -> None:
    lines = lines_of(snapshot_of(3), width, height)
    assert {len(line) for line in lines} == {width} and len(lines) < 24
    assert not any("loss terms" in line or "scores so far" in line for line in lines)


@pytest.mark.parametrize("num_students", [1, 4, 9, 12, 25])
def test_panel__is_never_higher_than_the_screen(num_students: int) -> None:
    lines = lines_of(snapshot_of(num_students), 120, 40)
    assert {len(line) for line in lines} == {120} and len(lines) < 40
    if num_students == 9:
        assert any("scores so far" in line for line in lines), "it comes before the curves"


def test_panel__without_scores_or_rows_these_parts_are_left_out() -> None:
    bare = replace(snapshot_of(2, num_scored=0), rows={"student-0": [], "student-1": []})
    text = "\n".join(lines_of(bare, 120, 40))
    assert (
        "scores so far" not in text and "loss terms" not in text and "since the start" not in text
    )
    nan = replace(ROW, phase="family", loss=float("nan"), terms={"dino": float("nan")})
    assert "loss terms" in "\n".join(
        lines_of(replace(bare, rows={"student-0": [nan], "student-1": []}), 120, 40)
    )


def test_tall_curve__one_column_per_run_of_values() -> None:
    assert tall_curve([1.0, 1.0, 2.0, 2.0], 2, 2) == [" █", "▁█"]
    assert tall_curve([3.0, 3.0], 5, 1) == ["▄▄"]
    assert tall_curve([0.0, 15.0, 7.0], 3, 2) == [" █ ", "▁██"]
