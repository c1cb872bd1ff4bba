"""How a launcher ends: what a signal does while networks are scored."""

import os
import signal
import time
from pathlib import Path

import pytest

from distill.errors import StorageError, UserError
from distill.launch.local import STOPPED_EXIT_CODE, _finalize
from distill.report import summary
from distill.runfolder.requests import handling
from distill.runfolder.status import NetworkStatus, StatusFile
from tests.support.status import STATUS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_finalize__a_signal_ends_the_scoring_and_says_how_to_get_scores(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(_: Path) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10.0)
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr(summary, "finish", score)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    file = StatusFile(tmp_path, interval_s=0.0)
    file.write(STATUS.ended("exporting", ""))
    requests = list[int]()
    # as the launcher has it while ranks train
    with handling({number: lambda *_: requests.append(1)}), pytest.raises(UserError) as ended:
        _finalize(tmp_path, None, 0)
    signal.signal(signal.SIGHUP, before)
    assert ended.value.exit_code == STOPPED_EXIT_CODE and not requests
    assert f"distill eval {tmp_path}" in ended.value.fix
    status = file.read()
    assert status is not None and status.state == "stopped"
    assert status.message == f"scores are missing: distill eval {tmp_path}"
    assert status.networks["small"] == NetworkStatus((0, 1), "done")


def test_finalize__storage_that_stays_away_while_scoring_leaves_a_run_to_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(_: Path) -> None:
        raise StorageError("/a.png: the storage does not give it")

    monkeypatch.setattr(summary, "finish", score)
    file = StatusFile(tmp_path, interval_s=0.0)
    file.write(STATUS.ended("exporting", ""))
    with pytest.raises(StorageError) as ended:
        _finalize(tmp_path, None, 0)
    status = file.read()
    assert ended.value.exit_code == 4 and status is not None and status.state == "stopped"
    assert status.message == f"scores are missing: distill eval {tmp_path}"


def test_finalize__a_job_that_was_stopped_ends_with_the_code_asked_for(tmp_path: Path) -> None:
    StatusFile(tmp_path, interval_s=0.0).write(STATUS.ended("stopped", "saved"))
    assert _finalize(tmp_path, None, 75) == 75
