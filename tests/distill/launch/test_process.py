"""A launcher is recognised by number and start time, not as a rank's parent."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distill.launch.process import ProcessMark, this_process
from distill.launch.rank import RankMonitor
from distill.runfolder.failure import LOST_EXIT_CODE
from distill.runfolder.requests import StopSaveRequests


def test_is_running__this_process_and_not_another_one_of_its_number() -> None:
    mark = this_process()
    assert mark.pid == os.getpid() and mark.is_running()
    assert not replace(mark, start_ticks=mark.start_ticks + 1).is_running()


def test_is_running__not_once_it_ended_even_while_nobody_collected_it() -> None:
    text = (
        "from distill.launch.process import this_process as t; m = t(); print(m.pid, m.start_ticks)"
    )
    child = subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    pid, start_ticks = child.stdout.read().split()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and still listed
    mark = ProcessMark(int(pid), int(start_ticks))
    assert not mark.is_running()
    child.communicate()
    assert not mark.is_running()


def test_look__a_rank_ends_when_its_launcher_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ended = tmp_path, list[int]()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", ended.append)
    here = this_process()
    RankMonitor(folder, 1, here).look(StopSaveRequests(folder))
    assert ended == []
    gone = replace(here, start_ticks=here.start_ticks + 1)
    RankMonitor(folder, 1, gone).look(StopSaveRequests(folder))
    assert ended == [LOST_EXIT_CODE]
