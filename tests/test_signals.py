"""Signals to a whole job of two ranks as a terminal or a scheduler sends them, and what is left after it: nothing.

One job each: stopped by SIGTERM to the group and started again; left by its launcher and fork server;
ended at once by a second Ctrl-C.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distill.launch.local import STOPPED_EXIT_CODE
from distill.runfolder.failure import LOST_EXIT_CODE
from distill.runfolder.heartbeat import read_records
from tests.support import jobs

Start = Callable[..., "subprocess.Popen[str]"]
ENDS_WITHIN_S = 10.0  # a rank looks twice a second; the rest is for a busy machine
SERVER_ENDS_WITHIN_S = 20.0  # by itself, after the launcher: it takes down what it has imported


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the job in a session of its own; at the end nothing of it is left, whatever the test did."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    recipe = jobs.write_recipes(tmp_path, stage_steps=2000, steps=20, save_every=1000)
    started = list[subprocess.Popen[str]]()

    def start_job(*words: str) -> subprocess.Popen[str]:
        started.append(jobs.start(recipe.with_name("teacher.yaml"), tmp_path, *words))
        return started[-1]

    yield start_job
    for process in started:
        if jobs.session_of(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "tiny-teacher"


def wait_until_both_train(process: "subprocess.Popen[str]", run: Path, wait_s: float = 120) -> int:
    """Returns when both ranks of this launch have made some steps: the step of the one behind."""
    deadline = time.monotonic() + wait_s
    while True:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no steps"
        ranks = jobs.ranks_of(process.pid)
        records = [record for record in read_records(run, 2) if record.pid in ranks]
        steps = [record.phase_step for record in records if record.activity not in SETTING_UP]
        if len(steps) == 2 and all(record.beat > 2 for record in records):
            return min(steps)
        time.sleep(0.05)


SETTING_UP = ("starting", "between phases")


def assert_nothing_left(process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + SERVER_ENDS_WITHIN_S
    while (left := jobs.session_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, [Path(f"/proc/{pid}/cmdline").read_bytes()[-80:] for pid in left]


@pytest.mark.slow
def test_sigterm__to_the_whole_group_saves_and_the_same_command_goes_on(
    start: Start, run: Path
) -> None:
    process = start("engine.log_every=1", "--stopped-code", "75")
    wait_until_both_train(process, run)
    os.killpg(process.pid, signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert_nothing_left(process)
    status = jobs.status_of(run)
    assert status["state"] == "stopped" and "resume with: distill train" in told
    saved = status["last_checkpoint"]["step"]
    assert saved == status["step"] > 0
    assert (run / "checkpoints" / f"base-{saved:07d}" / "manifest.json").is_file()
    rows = [json.loads(line) for line in (run / "metrics/teacher.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, saved + 1))  # engine.log_every
    process = start("engine.log_every=1")
    assert wait_until_both_train(process, run) >= saved
    os.killpg(process.pid, signal.SIGHUP)  # as a terminal does that is closed
    assert process.wait(timeout=60) == 0
    assert jobs.status_of(run)["step"] > saved


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["launcher and server", "server"])
def test_sigkill__of_launcher_or_fork_server_ends_the_ranks(
    killed: str, start: Start, run: Path
) -> None:
    process = start()
    wait_until_both_train(process, run)
    ranks, servers = jobs.ranks_of(process.pid), jobs.servers_of(process.pid)
    assert len(ranks) == 2 and len(servers) == 1
    if "server" in killed:
        os.kill(servers[0], signal.SIGKILL)
    if "launcher" in killed:
        os.kill(process.pid, signal.SIGKILL)
    assert jobs.left_after(ranks, wait_s=ENDS_WITHIN_S) == []
    told, _ = process.communicate(timeout=30)
    if "launcher" not in killed:
        assert process.returncode == LOST_EXIT_CODE and "ended without a word" in told, told
    assert_nothing_left(process)


@pytest.mark.slow
def test_ctrl_c__twice_ends_at_once_and_leaves_nothing(start: Start, run: Path) -> None:
    process = start()
    wait_until_both_train(process, run)
    os.kill(jobs.ranks_of(process.pid)[-1], signal.SIGSTOP)  # so the first one finds no agreement
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    since = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    code, took_s = process.wait(timeout=30), time.monotonic() - since
    told, _ = process.communicate(timeout=30)
    assert code == STOPPED_EXIT_CODE and took_s < ENDS_WITHIN_S, (took_s, told)
    assert "ended at once, nothing was saved" in told and "Traceback" not in told
    assert_nothing_left(process)
    assert not list((run / "checkpoints").glob("base-*"))
