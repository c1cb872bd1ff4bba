import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from distill.launch.watchdog import end_ranks
from distill.runfolder.heartbeat import (
    ROOT,
    Heartbeat,
    HeartbeatRecord,
    read_record,
    record_path,
)
from distill.runfolder.process_identity import this_process

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
NAMESPACE = [
    "unshare",
    "--user",
    "--map-root-user",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
]
# Writes a record in a pid namespace of its own and stays, so that its number is one of ours too
BEAT = """
import sys, time
from pathlib import Path
from distill.runfolder.heartbeat import Heartbeat
with Heartbeat(Path(sys.argv[1]), 0):
    time.sleep(60)
"""


@pytest.fixture
def victim(tmp_path: Path) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()


def record_of(folder: Path, pid: int) -> HeartbeatRecord:
    """A record of the process with that number, as it would write it itself."""
    text = Path(f"/proc/{pid}/stat").read_text()
    ticks = int(text.rpartition(")")[2].split()[19])
    return replace(Heartbeat(folder, 0).record(), pid=pid, start_ticks=ticks)


@pytest.mark.parametrize(
    "other",
    [
        {"host": "elsewhere"},
        {"boot_id": "an earlier start of the host"},
        {"pid_namespace": "pid:[1]"},
        {"start_ticks": 1},
        {"boot_id": "", "pid_namespace": "", "start_ticks": 0},
    ],
)
def test_end_ranks__another_process_of_that_number_gets_no_signal(
    tmp_path: Path, victim: "subprocess.Popen[bytes]", other: dict[str, object]
) -> None:
    record = record_of(tmp_path, victim.pid)
    assert record.process.state() in {"S", "R", "D"}
    foreign = replace(record, **other)  # type: ignore[arg-type]
    assert foreign.process.state() == ("" if other == {"start_ticks": 1} else "?")
    end_ranks([foreign])
    assert victim.poll() is None
    end_ranks([replace(record, end="done")])
    assert victim.poll() is None


def test_end_ranks__the_process_of_the_record_is_ended(
    tmp_path: Path, victim: "subprocess.Popen[bytes]"
) -> None:
    end_ranks([record_of(tmp_path, victim.pid)])
    assert victim.wait(timeout=10.0) < 0


def test_read_record__one_without_an_identity_is_read(tmp_path: Path) -> None:
    values = asdict(Heartbeat(tmp_path, 0).record())
    for name in ("boot_id", "pid_namespace", "start_ticks"):
        del values[name]
    record_path(tmp_path, 0).parent.mkdir()
    record_path(tmp_path, 0).write_text(json.dumps(values))
    record = read_record(tmp_path, 0)
    assert record is not None and not record.process.is_here()


def test_this_process__is_the_calling_process() -> None:
    identity = this_process()
    assert identity.pid == os.getpid() and identity.is_here()
    assert identity.is_running() and identity.state() == "R"
    assert replace(identity, pid=2**22 + 1).state() == ""  # above the largest process id


def test_end_ranks__a_number_of_another_pid_namespace_gets_no_signal(
    tmp_path: Path,
) -> None:
    """The record is of a small number inside; the process with that number outside must not hear of it."""
    tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"unshare --pid is refused here: {tried.stderr.strip()}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*NAMESPACE, sys.executable, "-c", BEAT, str(tmp_path)]
    inside = subprocess.Popen(command, env=environment)
    try:
        until = time.monotonic() + 60.0
        while (record := read_record(tmp_path, 0)) is None and time.monotonic() < until:
            time.sleep(0.1)
        assert record is not None
        assert record.pid != inside.pid and record.pid_namespace
        assert record.process.state() == "?"
        assert not record.process.is_here() and record.process.is_running()
        ours = replace(record, pid=inside.pid)  # a process that there is here
        end_ranks([ours])
        assert inside.poll() is None
    finally:
        inside.kill()
        inside.wait()
