"""A run folder on a file system without locks: a job starts, with a warning, and notices one that is at work."""

import errno
import fcntl
import logging
import os
import threading
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.runfolder.heartbeat import Heartbeat
from distill.runfolder.lock import run_lock


@pytest.fixture(params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK], autouse=True)
def reason(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Why every lock is refused."""
    number: int = request.param

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    return os.strerror(number)


def test_run_lock__the_start_goes_on_with_one_warning(
    reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    with caplog.at_level(logging.WARNING), run_lock(tmp_path / "run") as lock:
        lock.alone(wait_s=0.0)
        lock.share()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path / 'run'}: no locks here ({reason}); until ")


def test_run_lock__a_job_at_work_is_noticed_by_its_heartbeats(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    refused = pytest.raises(UserError, match="another job is at work")
    beaten = threading.Event()
    with Heartbeat(run, 0, on_beat=beaten.set), run_lock(run) as lock, refused:
        assert beaten.wait(10.0)
        lock.alone(wait_s=0.0)
    with run_lock(run) as lock:  # its records stay, and nothing writes them any more
        lock.alone(wait_s=0.0)
