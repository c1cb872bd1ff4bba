"""What a tracker gets: every row once, over resumes and restarts of the follower."""

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from distill.runfolder.metrics import MetricsRow, MetricsWriter, drop_after
from distill.runfolder.progress import FIGURES, add_progress, cut_progress
from distill.screen import follower
from distill.screen.follower import Follower, follow
from distill.screen.trackers import TrackerSink, values_of
from tests.support.run_folders import scored_row, write_run
from tests.support.status import ROW


class Sink:
    """Remembers what it gets; ``written`` is the list of the test."""

    def __init__(self, written: list[tuple[str, str, int]], network: str, run_id: str) -> None:
        self._written, self._network, self._id = written, network, run_id
        self.is_closed = False

    def write(self, row: MetricsRow) -> None:
        assert not self.is_closed
        self._written.append((self._network, self._id, row.step))

    def write_scores(self, step: int, values: Mapping[str, float]) -> None:
        assert not self.is_closed and set(values) <= {f"score/{name}" for name in FIGURES}
        self._written.append((f"{self._network} {values['score/class_neighbours']}", "", step))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    found: list[tuple[str, str, int]] = []

    def open_sink(_: Path, network: str, run_id: str, done_steps: int) -> TrackerSink:
        assert done_steps == max((s for n, _, s in found if n == network), default=0)
        return Sink(found, network, run_id)

    monkeypatch.setattr(follower, "TRACKERS", {"test": open_sink})
    return found


def once(run: Path) -> int:
    stop = threading.Event()
    stop.set()
    return follow(run, "test", stop)


def test_follow__hands_every_row_on_once_at_its_step_of_the_run(
    tmp_path: Path, written: list[tuple[str, str, int]]
) -> None:
    run = write_run(tmp_path / "mine", picture=False)
    assert once(run) == 40 + 20 + 20
    assert [step for name, _, step in written if name == "teacher"] == list(range(10, 401, 10))
    assert [step for name, _, step in written if name == "tiny"] == list(range(410, 601, 10))
    assert once(run) == 0, "the tracker has them"
    assert len({run_id for _, run_id, _ in written}) == 3


def test_follow__goes_on_after_a_resume_in_the_same_run(
    tmp_path: Path, written: list[tuple[str, str, int]]
) -> None:
    run = write_run(tmp_path / "mine", picture=False)
    once(run)
    before = len(written)
    phases = ["base", "gram", "family"]
    drop_after(run, "small", phases=phases, phase="family", step=150)
    with MetricsWriter(run, "small") as writer:
        for step in range(160, 231, 10):
            writer.write(replace(ROW, phase="family", step=step))
    assert once(run) == 3
    assert [step for _, _, step in written[before:]] == [610, 620, 630]
    ids = {run_id for name, run_id, _ in written if name == "small"}
    assert len(ids) == 1


def test_follow__hands_scores_on_once_at_their_step_of_the_run(
    tmp_path: Path, written: list[tuple[str, str, int]]
) -> None:
    run = write_run(tmp_path / "mine", picture=False)
    add_progress(run, [scored_row("small", 50), scored_row("tiny", 50)])
    assert once(run) == 80 + 2
    assert written[-2:] == [("small 0.5", "", 450), ("tiny 0.5", "", 450)]
    cut_progress(run, 0)  # a resume from before the first of them
    add_progress(run, [scored_row("small", 50), scored_row("small", 100, 0.75)])
    assert once(run) == 1
    assert written[-1] == ("small 0.75", "", 500)


def test_follow__while_the_files_grow_and_are_rewritten(
    tmp_path: Path, written: list[tuple[str, str, int]]
) -> None:
    run = write_run(tmp_path / "mine", picture=False)
    both = Follower(run, "test")
    both.poll()
    before = len(written)
    with (run / "metrics" / "small.jsonl").open("a") as file:
        file.write(
            "not a row\n" + json.dumps(replace(ROW, phase="family", step=210).to_json())[:40]
        )
        file.flush()
        both.poll()
        assert len(written) == before, "half a line waits"
        file.write(json.dumps(replace(ROW, phase="family", step=210).to_json())[40:] + "\n")
    both.poll()
    assert written[before:] == [("small", written[before][1], 610)]
    text = (run / "metrics" / "small.jsonl").read_text()
    (run / "metrics" / "small.jsonl").write_text(text[: len(text) // 2])
    both.poll()
    assert len(written) == before + 1
    both.close()


def test_follow__ends_soon_after_it_is_stopped(
    tmp_path: Path, written: list[tuple[str, str, int]]
) -> None:
    run, stop = write_run(tmp_path / "mine", picture=False), threading.Event()
    thread = threading.Thread(target=follow, args=(run, "test", stop), kwargs={"interval_s": 600.0})
    thread.start()
    deadline = time.monotonic() + 60.0
    while len(written) < 80 and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.set()
    thread.join(60.0)
    assert not thread.is_alive() and len(written) == 80


def test_values__have_terms_apart() -> None:
    values = values_of(ROW)
    assert values["term/koleo"] == 0.5 and values["loss"] == 8.5 and values["skipped"] == 0.0
