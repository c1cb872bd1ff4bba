"""The board of a node: found by its ranks alone, removed when they have ended."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from distill.errors import SetupError
from distill.launch import board as boards
from distill.launch.board import board_of, leave_board, sweep_boards
from distill.runfolder.heartbeat import Heartbeat, HeartbeatRecord, publish_records
from distill.runfolder.process_identity import this_process


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(boards, "MEMORY", folder)
    return folder


def record_of(rank: int, **values: object) -> HeartbeatRecord:
    return replace(Heartbeat(Path(), rank).record(), beat=1, **values)  # type: ignore[arg-type]


def test_board_of__one_for_a_launch_on_a_node(
    memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert board_of(run, "/tmp/distill-x/store", has_launcher=True) == Path("/tmp/distill-x")
    mine = board_of(run, "", has_launcher=False)
    assert mine == board_of(run, "", has_launcher=False) and mine.parent == memory
    assert mine.stat().st_mode & 0o777 == 0o700
    (run / "job.json").write_text('{"request": {"launch": "another"}}')
    assert board_of(run, "", has_launcher=False) != mine
    before = this_process()
    monkeypatch.setattr(boards, "this_process", lambda: replace(before, pid_namespace="pid:[7]"))
    assert len({*memory.iterdir(), board_of(run, "", has_launcher=False)}) == 3


def test_board_of__what_others_can_enter_is_refused(memory: Path, tmp_path: Path) -> None:
    board = board_of(tmp_path, "", has_launcher=False)
    board.chmod(0o777)
    with pytest.raises(SetupError, match="others can enter it"):
        board_of(tmp_path, "", has_launcher=False)
    board.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    board.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SetupError, match="belongs to another user"):
        board_of(tmp_path, "", has_launcher=False)


def test_leave_board__the_last_one_removes_it(memory: Path, tmp_path: Path) -> None:
    board = board_of(tmp_path, "", has_launcher=False)
    publish_records(board, [record_of(0, end="done"), record_of(1)])
    leave_board(board)
    assert board.is_dir()
    publish_records(board, [record_of(0, end="done"), record_of(1, end="done")])
    leave_board(board)
    assert not board.exists()


def test_sweep_boards__what_a_killed_launch_left_goes(memory: Path, tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, lives, far, mine = (
        memory / f"distill-{os.getuid()}-{name}" for name in ("left", "lives", "far", "mine")
    )
    for board, values in ((left, {"pid": ended.pid}), (lives, {}), (far, {"host": "other"})):
        board.mkdir()
        publish_records(board, [record_of(0, **values)])
    mine.mkdir()
    sweep_boards(mine)
    assert {*memory.iterdir()} == {lives, far, mine}
    long_ago = time.time() - boards.SILENT_S - 10.0
    os.utime(far / "heartbeat/node-00000.json", (long_ago, long_ago))
    sweep_boards(mine)
    assert {*memory.iterdir()} == {lives, mine}
