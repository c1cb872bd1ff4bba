import os
import signal
import threading
from pathlib import Path

import pytest

from distill.runfolder.heartbeat import (
    FIRST_ALLOWED_S,
    Heartbeat,
    process_state,
    read_record,
    read_records,
    stacks_on_signal,
    state_of,
)


def test_pulse__says_where_the_rank_is(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3)
    heartbeat.enter_phase("family", 5)
    heartbeat.enter("learning", 7, "small")
    record = heartbeat.record()
    assert record.describe() == f"rank 3 on {record.host}: learning small, family step 7"
    assert record.pid == os.getpid() and not record.is_waiting and not record.end
    heartbeat.enter("exchange", 8)
    assert heartbeat.record().is_waiting


def test_pulse__a_known_activity_may_take_the_limit_and_a_new_one_long(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0)
    heartbeat.set_limit(5.0)
    for step in range(3):
        heartbeat.enter("learning", step)
        assert heartbeat.record().allowed_s == (FIRST_ALLOWED_S if step < 2 else 5.0)
        heartbeat.enter("saving", step)
        assert heartbeat.record().allowed_s == FIRST_ALLOWED_S


def test_pulse__writes_until_the_end_and_says_how_it_ended(tmp_path: Path) -> None:
    beaten = threading.Event()
    with pytest.raises(RuntimeError, match="over"), Heartbeat(tmp_path, 0, on_beat=beaten.set):
        assert beaten.wait(10.0)
        record = read_record(tmp_path, 0)
        assert record is not None and not record.end
        raise RuntimeError("over")
    ended = read_record(tmp_path, 0)
    assert ended is not None and ended.end == "RuntimeError: over" and ended.beat > record.beat
    assert read_records(tmp_path, 2) == [ended]


def test_read_sign__half_a_record_is_none(tmp_path: Path) -> None:
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat/rank-00000.json").write_text('{"world_rank": 0, "ho')
    assert read_record(tmp_path, 0) is None


def test_process_state__knows_this_host_only(tmp_path: Path) -> None:
    record = Heartbeat(tmp_path, 0).record()
    assert process_state(record) == state_of(os.getpid()) == "R"
    assert state_of(2**22 + 1) == ""  # above the largest process id


def test_stacks_on_signal__are_written_and_an_empty_file_is_not_left(tmp_path: Path) -> None:
    with stacks_on_signal(tmp_path, 0) as path:
        pass
    assert not path.exists()
    with stacks_on_signal(tmp_path, 0) as path:
        os.kill(os.getpid(), signal.SIGUSR2)
    assert "test_stacks_on_signal" in path.read_text()
