import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.runfolder.requests import (
    SAVE,
    STOP,
    StopSaveRequests,
    forget,
    is_requested,
    leave_request,
)


@pytest.fixture
def with_terminal() -> Iterator[None]:
    """Not as under ``nohup``, where the tests may run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked__a_signal_asks_to_stop(
    tmp_path: Path, number: signal.Signals, with_terminal: None
) -> None:
    asked = StopSaveRequests(tmp_path)
    with asked.listening():
        assert not asked.to_stop()
        os.kill(os.getpid(), number)
        assert asked.to_stop() and not asked.take_save()


def test_asked__sighup_stays_ignored_under_nohup(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSaveRequests(tmp_path).listening():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_asked__sigusr1_asks_for_one_save(tmp_path: Path) -> None:
    asked = StopSaveRequests(tmp_path)
    with asked.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert asked.take_save() and not asked.take_save() and not asked.to_stop()


def test_asked__finds_what_was_left_in_files(tmp_path: Path) -> None:
    asked = StopSaveRequests(tmp_path)
    asked.look()
    assert not asked.to_stop() and not asked.take_save()
    leave_request(tmp_path, SAVE)
    leave_request(tmp_path, STOP)
    asked.look()
    assert asked.to_stop() and asked.take_save()
    asked.look()
    assert not asked.take_save()  # a wish is granted once
    assert is_requested(tmp_path, STOP) and not is_requested(tmp_path, SAVE)
    forget(tmp_path)
    assert not is_requested(tmp_path, STOP)
