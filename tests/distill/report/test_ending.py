"""What ``finish`` writes last: README.md and the page, neither at the cost of the run."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distill.report import ending
from distill.report.ending import write_ending
from tests.support.run_folders import SUMMARY, write_run
from tests.support.status import STATUS


def test_write_ending__shows_the_run_as_it_ends(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine", state="evaluating")
    ended = write_ending(run, SUMMARY, replace(STATUS, work_done=1.0), ["one student is parked"])
    assert (ended.state, ended.message) == ("finished", "one student is parked")
    page = (run / "report.html").read_text()
    assert (
        "State: finished" in page
        and "one student is parked" in page
        and "0.810" in page
        and "data:image/webp" in page
    )
    assert "| small | 0.810 | 0.350 | 5.500 |" in (run / "README.md").read_text()


def test_write_ending__reports_what_it_could_not_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "mine")
    no_room = (
        f"README.md was not written ([Errno 28] No space left on device): run `distill eval {run}`"
    )

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("a bug")

    def fill_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ending, "make_page", fail)
    monkeypatch.setattr(ending, "replace_text", fill_disk)
    message = write_ending(run, SUMMARY, STATUS, ["before"]).message
    assert message.startswith(f"before; {no_room}; ")
    assert message.endswith(f"report.html was not written ('a bug'): run `distill eval {run}`")


def test_write_ending__leaves_pictures_out_of_a_page_that_is_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "mine")
    monkeypatch.setattr(ending, "MOST_BYTES", 10_000)
    assert not write_ending(run, SUMMARY, STATUS, []).message
    assert "data:image" not in (run / "report.html").read_text()
