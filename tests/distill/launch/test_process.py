"""A launcher is recognised by number and start time, not as a rank's parent."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from distill.launch.process import ProcessMark, this_process


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


WAITS = """\
import sys, threading
from distill.launch.process import ProcessMark, end_with, parent_process
others = [parent_process(), ProcessMark(*map(int, sys.argv[1:]))]
end_with(others, 7)
print("watching", flush=True)
threading.Event().wait()  # as a rank that has done its work waits for its launcher
"""


@pytest.mark.parametrize("is_parent", [False, True])
def test_end_with__a_process_that_waits_for_ever_ends_with_either(is_parent: bool) -> None:
    """The process is started through another one, so that its parent can be ended too."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    start = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
    code = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {WAITS!r}, *sys.argv[1:]]))"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(other.pid), start], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None and parent.stdout.readline() == "watching\n"
    (parent if is_parent else other).kill()
    assert parent.stdout.read() == ""  # returns when the last process that holds it has ended
    assert parent.wait(timeout=10) == (-9 if is_parent else 7)
    parent.stdout.close()
    other.kill()
    other.wait()
