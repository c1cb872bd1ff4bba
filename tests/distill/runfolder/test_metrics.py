import json
import math
import resource
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.runfolder.events import read_events
from distill.runfolder.metrics import (
    KEPT_ROWS,
    MetricSink,
    MetricSinks,
    MetricsReader,
    MetricsRow,
    MetricsWriter,
    drop_after,
    metrics_path,
    read_rows,
)
from distill.runfolder.status import (
    StatusFile,
    note_time,
    read_times,
    work_done,
    write_json,
)
from tests.support.full_disk import small_files
from tests.support.status import PHASES, ROW, STATUS


def write_rows(run_folder: Path, rows: list[MetricsRow]) -> None:
    with MetricsWriter(run_folder, "small") as writer:
        for row in rows:
            writer.write(row)


@given(
    phase=st.sampled_from([phase.name for phase in PHASES]),
    fraction=st.floats(0.0, 1.0),
)
def test_work_done__never_falls_and_stays_within_one(phase: str, fraction: float) -> None:
    steps = next(entry.steps for entry in PHASES if entry.name == phase)
    step = int(fraction * (steps - 1))
    assert 0.0 <= work_done(PHASES, phase, step) < work_done(PHASES, phase, step + 1) <= 1.0 + 1e-12


def test_work_done__end_of_a_phase_is_the_start_of_the_next() -> None:
    assert work_done(PHASES, "base", 300) == pytest.approx(work_done(PHASES, "gram", 0))
    assert work_done(PHASES, "family", 200) == pytest.approx(1.0)


def test_work_done__unknown_phase() -> None:
    with pytest.raises(ValueError, match="'warm' is not one of this run's phases: base, gram"):
        work_done(PHASES, "warm", 0)


def test_write_json__leaves_no_other_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": math.inf})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None}


def test_status_file__reads_what_was_written(tmp_path: Path) -> None:
    file = StatusFile(tmp_path)
    assert file.read() is None
    assert file.write(STATUS)
    assert StatusFile(tmp_path).read() == STATUS


def test_status_file__progress_waits_but_events_do_not(tmp_path: Path) -> None:
    now = [0.0]
    file = StatusFile(tmp_path, interval_s=0.5, clock=lambda: now[0])
    assert file.write(STATUS)
    now[0] = 0.4
    assert not file.write(replace(STATUS, step=21))
    assert file.write(replace(STATUS, step=21, state="saving"))
    assert file.write(replace(STATUS, step=21, state="saving", message="student small"))
    now[0] = 0.95
    assert file.write(replace(STATUS, step=22, state="saving", message="student small"))
    read = file.read()
    assert read is not None and read.step == 22


@pytest.mark.parametrize("text", ["[1]", '{"state": "training"}', '{"state": "x", "new_field": 1}'])
def test_status_file__foreign_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(UserError, match=r"status\.json: does not describe a run of this version"):
        StatusFile(tmp_path).read()


@pytest.mark.parametrize("text", ["", "{", "\0\0\0"])
def test_status_file__damaged_by_a_power_cut_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    (tmp_path / "timing.json").write_text(text)
    assert StatusFile(tmp_path).read() is None and read_times(tmp_path) == {}
    note_time(tmp_path, "base", 2.0, 30)
    note_time(tmp_path, "base", 1.0, 10)
    assert read_times(tmp_path) == {"base": {"s": 3.0, "images": 40}}


def test_metrics_row__is_flat_in_the_file(tmp_path: Path) -> None:
    write_rows(tmp_path, [ROW])
    line = json.loads(metrics_path(tmp_path, "small").read_text())
    assert line["ibot"] == 3.0 and line["loss"] == 8.5 and "terms" not in line
    assert read_rows(tmp_path, "small") == [ROW]


def test_metrics_row__term_may_not_hide_a_field() -> None:
    with pytest.raises(ValueError, match="may not be called 'lr'"):
        replace(ROW, terms={"lr": 1.0}).to_json()


def test_metrics_writer__nan_becomes_null_and_back(tmp_path: Path) -> None:
    write_rows(tmp_path, [replace(ROW, loss=math.nan, terms={"dino": math.inf}, skipped=1)])
    assert '"loss": null' in metrics_path(tmp_path, "small").read_text()
    (row,) = read_rows(tmp_path, "small")
    assert math.isnan(row.loss) and math.isnan(row.terms["dino"]) and row.skipped == 1


def test_metrics_writer__cuts_what_a_crash_left(tmp_path: Path) -> None:
    write_rows(tmp_path, [ROW])
    with metrics_path(tmp_path, "small").open("a") as file:
        file.write('{"phase": "ba')
    write_rows(tmp_path, [replace(ROW, step=20)])
    assert [row.step for row in read_rows(tmp_path, "small")] == [10, 20]


def test_metrics_reader__a_partial_line_waits_for_its_end(tmp_path: Path) -> None:
    reader = MetricsReader(tmp_path, "small")

    def steps() -> list[int]:
        reader.poll()
        return [row.step for row in reader.rows]

    assert steps() == []
    write_rows(tmp_path, [ROW])
    assert steps() == [10]
    line = json.dumps(replace(ROW, step=20).to_json())
    with metrics_path(tmp_path, "small").open("a") as file:
        file.write(line[:30])
        file.flush()
        assert steps() == [10]
        file.write(line[30:] + "\n")
    assert steps() == [10, 20]


def test_metrics_reader__keeps_evenly_spaced_rows_of_a_long_history(tmp_path: Path) -> None:
    line = json.dumps(replace(ROW, step=-7).to_json())
    path = metrics_path(tmp_path, "small")
    path.parent.mkdir()
    reader, num_lines = MetricsReader(tmp_path, "small"), 0
    for count in (30_000, 1, 5, 20_001):
        with path.open("a") as file:
            file.writelines(
                line.replace("-7", str(step)) + "\n" for step in range(num_lines, num_lines + count)
            )
        num_lines += count
        reader.poll()
        steps = [row.step for row in reader.rows]
        assert steps[-1] == num_lines - 1 and KEPT_ROWS <= len(steps) <= 2 * KEPT_ROWS + 1
        gaps = [after - before for before, after in pairwise(steps)]
        assert len(set(gaps[:-1])) == 1 and gaps[-1] <= gaps[0]
    assert drop_after(tmp_path, "small", phases=["base"], phase="base", step=40_000) == 10_006
    reader.poll()
    assert reader.rows[-1].step == 40_000


def test_metrics_reader__bad_line_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path, [ROW])
    with metrics_path(tmp_path, "small").open("a") as file:
        file.write('{"phase": "base"}\n')
    with pytest.raises(UserError, match=r"small\.jsonl:2: not a line of metrics"):
        read_rows(tmp_path, "small")


class Toy:
    """A sink that refuses one step."""

    def __init__(self, run_folder: Path, network: str) -> None:
        self.steps: list[int] = []
        self.is_closed = False

    def write(self, row: MetricsRow) -> None:
        if row.step == 20:
            raise ConnectionError("no network")
        self.steps.append(row.step)

    def close(self) -> None:
        self.is_closed = True


def test_metric_sinks__one_that_fails_gets_no_more_rows_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    class Other(Toy):
        def write(self, row: MetricsRow) -> None:
            self.steps.append(row.step)

    made: list[Toy] = []

    def factory(kind: type[Toy], run_folder: Path, network: str) -> MetricSink:
        made.append(kind(run_folder, network))
        return made[-1]

    sinks = MetricSinks(tmp_path, "small", [partial(factory, Toy), partial(factory, Other)])
    for step in (10, 20, 30):
        sinks.write(replace(ROW, step=step))
    sinks.close()
    assert [row.step for row in read_rows(tmp_path, "small")] == [10, 20, 30]
    assert [(sink.steps, sink.is_closed) for sink in made] == [
        ([10], False),
        ([10, 20, 30], True),
    ]
    (event,) = read_events(tmp_path)
    assert event.text == "the metric sink Toy gets no more rows: no network"


def test_drop_after__history_ends_at_the_saved_step(tmp_path: Path) -> None:
    rows = [replace(ROW, phase=phase, step=step) for phase in ("base", "gram") for step in (10, 20)]
    write_rows(tmp_path, rows)
    reader = MetricsReader(tmp_path, "small")
    reader.poll()
    names = [phase.name for phase in PHASES]
    assert drop_after(tmp_path, "small", phases=names, phase="gram", step=20) == 0
    assert drop_after(tmp_path, "small", phases=names, phase="gram", step=0) == 2
    assert drop_after(tmp_path, "small", phases=names, phase="base", step=15) == 1
    assert read_rows(tmp_path, "small") == rows[:1]
    write_rows(tmp_path, [rows[1]])
    reader.poll()
    assert reader.rows == rows[:2]


def test_drop_after__damaged_lines_do_not_stop_a_resume(tmp_path: Path) -> None:
    rows = [replace(ROW, step=step) for step in (10, 20, 30)]
    write_rows(tmp_path, rows)
    path = metrics_path(tmp_path, "small")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff\x00" + lines[1] + lines[2] + b'{"phase": "ba')
    assert drop_after(tmp_path, "small", phases=["base"], phase="base", step=30) == 2
    assert read_rows(tmp_path, "small") == [rows[0], rows[2]]


def test_drop_after__unknown_phase(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'x' is not one of this run's phases: base"):
        drop_after(tmp_path, "small", phases=["base"], phase="x", step=0)


@small_files()
def test_write__rows_that_a_full_disk_refuses_follow_when_there_is_room(tmp_path: Path) -> None:
    long = replace(ROW, phase="x" * 40_000)  # two of them are more than a file may hold
    rows = [long, replace(long, step=20), replace(ROW, step=30)]
    with MetricsWriter(tmp_path, "small") as writer:
        writer.write(rows[0])
        writer.write(rows[1])
        assert read_rows(tmp_path, "small") == rows[:1]
        allow_large_files()
        writer.write(rows[2])
    assert read_rows(tmp_path, "small") == rows


@small_files()
def test_status__a_full_disk_keeps_the_one_before(tmp_path: Path) -> None:
    file = StatusFile(tmp_path, interval_s=0.0)
    assert file.write(STATUS)
    assert not file.write(replace(STATUS, message="x" * 100_000))
    assert file.read() == STATUS
    allow_large_files()
    assert file.write(replace(STATUS, message="x" * 100_000))


def allow_large_files() -> None:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
