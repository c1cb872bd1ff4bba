from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from distill.errors import RankError, SetupError, StorageError, UserError
from distill.runfolder.events import Event, note, read_events
from distill.runfolder.failure import (
    LOST_EXIT_CODE,
    Failure,
    failure_of,
    failure_of_dead,
    find_dead,
    is_lost_connection,
    read_failure,
    write_failure,
)
from distill.runfolder.heartbeat import Heartbeat
from distill.runfolder.lock import RunLock, run_lock
from tests.support.status import SIGN


def test_write_failure__the_first_cause_stays(tmp_path: Path) -> None:
    assert read_failure(tmp_path) is None
    first = Failure("error", "first", "do this", 1)
    write_failure(tmp_path, first)
    write_failure(tmp_path, Failure("died", "second", "", LOST_EXIT_CODE))
    assert read_failure(tmp_path) == first
    error = first.to_error()
    assert (error.message, error.fix, error.exit_code) == ("first", "do this", 1)


def test_failure_of__what_needs_a_person_keeps_its_words(tmp_path: Path) -> None:
    told = failure_of(SetupError("no device", fix="Buy one."), SIGN, tmp_path)
    assert (told.kind, told.message, told.fix, told.exit_code) == (
        "user",
        "no device",
        "Buy one.",
        3,
    )
    told = failure_of(RankError("rank 1 on node2: wrong", fix="Look."), SIGN, tmp_path)
    assert (told.kind, told.message) == ("error", "rank 1 on node2: wrong")  # tried again
    assert told.exit_code == LOST_EXIT_CODE
    told = failure_of(StorageError("/a.png: EIO", fix="Look."), SIGN, tmp_path)
    assert (told.kind, told.message) == ("error", "rank 0 on node1: /a.png: EIO")
    assert told.exit_code == LOST_EXIT_CODE and told.fix.startswith("Look. --max-restarts")
    told = failure_of(KeyError("x"), SIGN, tmp_path)
    assert told.kind == "error" and told.exit_code == 1
    assert told.message == "rank 0 on node1: learning small, family step 40; KeyError: 'x'"


def test_failure_of__keeps_300_letters_of_all_lines(tmp_path: Path) -> None:
    text = "NCCL error in: x.cpp:1\nLast error:\nCuda failure 2 'out of memory'\n" + 400 * "x"
    message = failure_of(RuntimeError(text), SIGN, tmp_path).message
    kept = message.partition("RuntimeError: ")[2]
    assert len(kept) == 300 and "Last error: Cuda failure 2 'out of memory'" in kept


def test_failure_of_dead__who_aborted_is_named_so_and_after_who_was_killed() -> None:
    other = replace(SIGN, world_rank=1)
    assert "; ended by SIGABRT" in failure_of_dead([SIGN], {0: -6}).message
    both = failure_of_dead([SIGN, other], {0: -6, 1: -9}).message
    assert both.startswith("rank 1") and "SIGKILL" in both


def test_failure_of_dead__names_rank_host_student_step_and_signal() -> None:
    told = failure_of_dead([SIGN], {0: -9})
    said = "rank 0 on node1: learning small, family step 40; ended by SIGKILL"
    assert (told.kind, told.message, told.exit_code) == ("died", said, LOST_EXIT_CODE)
    two = failure_of_dead([SIGN, replace(SIGN, world_rank=1)], {0: -9})
    assert two.message.endswith("(and 1 more ranks)")
    assert "rank 1 on" in failure_of_dead([], {1: -9}).message


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (ConnectionResetError("Connection reset by peer"), True),
        (dist.DistBackendError("NCCL error: ncclRemoteError: remote process exited"), True),
        (dist.DistBackendError("Watchdog caught collective operation timeout: WorkNCCL(1)"), True),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (RuntimeError("Timed out waiting 600000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL error: ncclUnhandledCudaError: out of memory"), False),
        (dist.DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected"), False),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] op.preamble.length <= op.nbytes"), False),
        (RuntimeError("shape mismatch"), False),
        (ValueError("gloo"), False),
    ],
)
def test_is_lost_connection(error: Exception, is_lost: bool) -> None:
    assert is_lost_connection(error) == is_lost


def test_find_dead__who_ended_without_a_word(tmp_path: Path) -> None:
    for rank in range(2):
        with Heartbeat(tmp_path, rank):
            pass
    assert find_dead(tmp_path, 2) == []
    gone = Heartbeat(tmp_path, 1)
    gone._write()
    record = (tmp_path / "heartbeat/rank-00001.json").read_text()
    pid = f'"pid": {gone.record().pid}'
    assert pid in record
    (tmp_path / "heartbeat/rank-00001.json").write_text(record.replace(pid, f'"pid": {2**22 + 1}'))
    assert [record.world_rank for record in find_dead(tmp_path, 2)] == [1]


def test_run_lock__one_job_per_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with run_lock(folder) as mine, run_lock(folder) as theirs:
        mine.alone()
        with pytest.raises(UserError, match="another job is at work"):
            theirs.alone(wait_s=0.2)
        with pytest.raises(UserError, match="another job took it over"):
            theirs.share()
        mine.share()
        theirs.share()
    with run_lock(folder) as later:
        later.alone(wait_s=0.2)


def test_run_lock__leaves_nothing_where_no_run_was_made(tmp_path: Path) -> None:
    mine = RunLock(tmp_path / "runs/run")
    with run_lock(tmp_path / "runs/run") as theirs:
        mine.alone()
        with pytest.raises(UserError, match="another job is at work"):
            theirs.alone(wait_s=0.0)
        mine.close()
        theirs.alone(wait_s=0.0)  # the file that it had opened is gone: it holds the new one
        with run_lock(tmp_path / "runs/run") as third, pytest.raises(UserError, match="at work"):
            third.alone(wait_s=0.0)
    assert not list(tmp_path.glob("*/.run.lock"))
    (tmp_path / "empty").mkdir()
    with run_lock(tmp_path / "empty/run"), run_lock(tmp_path / "new/run"):
        pass
    assert (tmp_path / "empty").is_dir() and not (tmp_path / "new").exists()


def test_run_lock__is_of_the_real_folder_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "disk/run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/run")
    (tmp_path / "disks").symlink_to(tmp_path / "disk")
    names = ("disk/run", "link", "disks/run", "disk/../link")
    with run_lock(tmp_path / "link") as mine:
        mine.alone()
        for name in names:
            with run_lock(tmp_path / name) as theirs, pytest.raises(UserError, match="at work"):
                theirs.alone(wait_s=0.0)


def test_run_lock__where_it_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"\.run\.lock: the lock of .* cannot be written"),
        run_lock(tmp_path / "file/run"),
    ):
        pass


def test_events__are_read_back_in_order_and_from_a_time_on(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    note(tmp_path, Event("skipped", "small: step 3 skipped", "small", 3))
    note(tmp_path, Event("died", "rank 1"))
    first, second = read_events(tmp_path)
    assert (first.kind, first.network, first.step, second.text) == ("skipped", "small", 3, "rank 1")
    assert read_events(tmp_path, since_unix=second.time_unix + 1.0) == []
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('damaged\n{"kind": "di')
    assert len(read_events(tmp_path)) == 2
