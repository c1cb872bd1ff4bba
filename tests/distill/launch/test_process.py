"""A launcher is recognised by number and start time, not as a rank's parent."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from distill.runfolder.process_identity import identity_of, this_process


def test_is_running__this_process_and_not_another_one_of_its_number() -> None:
    identity = this_process()
    assert identity.pid == os.getpid() and identity.is_running()
    assert not replace(identity, start_ticks=identity.start_ticks + 1).is_running()


def test_is_running__not_once_it_ended_even_while_nobody_collected_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = identity_of(child.pid)
    assert identity.is_running()
    assert child.stdin is not None
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and still listed
    assert identity.state() == "Z" and not identity.is_running()
    child.wait()
    assert identity.state() == "" and not identity.is_running()


WAITS = """\
import os, sys, threading
from distill.launch.process import end_with
from distill.runfolder.process_identity import identity_of
end_with([identity_of(os.getppid()), identity_of(int(sys.argv[1]))], 7)
print("watching", flush=True)
threading.Event().wait()  # as a rank that has done its work waits for its launcher
"""


@pytest.mark.parametrize("is_parent", [False, True])
def test_end_with__a_process_that_waits_for_ever_ends_with_either(is_parent: bool) -> None:
    """The process is started through another one, so that its parent can be ended too."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    code = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {WAITS!r}, *sys.argv[1:]]))"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(other.pid)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None and parent.stdout.readline() == "watching\n"
    (parent if is_parent else other).kill()
    assert parent.stdout.read() == ""  # returns when the last process that holds it has ended
    assert parent.wait(timeout=10) == (-9 if is_parent else 7)
    parent.stdout.close()
    other.kill()
    other.wait()
