import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.data.loader import Loader
from distill.listing.storage import PATIENCE_S
from distill.runfolder.heartbeat import (
    COPIES,
    FIRST_ALLOWED_S,
    LOADING_ALLOWED_S,
    ROOT,
    SLOWER,
    STORAGE_ALLOWED_S,
    Heartbeat,
    read_record,
    read_records,
    stacks_on_signal,
)
from distill.train.faults import AppliedFlag
from teacher.batch import onto


def test_pulse__says_where_the_rank_is(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3)
    heartbeat.enter_phase("family", 5)
    heartbeat.enter("learning", 7, "small")
    record = heartbeat.record()
    assert record.describe() == f"rank 3 on {record.host}: learning small, family step 7"
    assert record.pid == os.getpid() and not record.is_waiting and not record.end
    heartbeat.enter("exchange", 8)
    assert heartbeat.record().is_waiting


def test_pulse__has_the_memory_of_the_process_or_of_its_device(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0)
    before = heartbeat.record().memory_bytes
    held = np.ones(2**26, np.uint8)
    assert heartbeat.record().memory_bytes > before + held.nbytes / 2 > 2**26
    heartbeat.set_memory(lambda: 12345)
    assert heartbeat.record().memory_bytes == 12345


def test_pulse__a_known_activity_may_take_the_limit_and_a_new_one_long(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0)
    heartbeat.set_limit(5.0)
    for step in range(3):
        heartbeat.enter("learning", step)
        assert heartbeat.record().allowed_s == (FIRST_ALLOWED_S if step < 2 else 5.0)
        heartbeat.enter("saving", step)
        assert heartbeat.record().allowed_s == FIRST_ALLOWED_S


def test_pulse__a_wait_for_storage_shows_and_may_take_minutes(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0)
    heartbeat.set_limit(5.0)
    for step in range(3):
        heartbeat.enter("loading", step)
    heartbeat.wait_for_storage("waiting for storage: /data/1.png (Input/output error), 12 s")
    record = heartbeat.record()
    assert record.allowed_s == STORAGE_ALLOWED_S > 2 * PATIENCE_S - 1
    text = "loading, before the first step, waiting for storage: /data/1.png (Input/output error), 12 s"
    assert record.describe() == f"rank 0 on {record.host}: {text}"
    heartbeat.wait_for_storage("")
    assert heartbeat.record().allowed_s == LOADING_ALLOWED_S and not heartbeat.record().storage


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


def test_stacks_on_signal__are_written_and_an_empty_file_is_not_left(tmp_path: Path) -> None:
    with stacks_on_signal(tmp_path, 0) as path:
        pass
    assert not path.exists()
    with stacks_on_signal(tmp_path, 0) as path:
        os.kill(os.getpid(), signal.SIGUSR2)
    assert "test_stacks_on_signal" in path.read_text()


class Standing:
    """A thread that stands in a call until it is let go; as the main thread of a heartbeat."""

    def __init__(self) -> None:
        self.is_there, self._go_on = threading.Event(), threading.Event()

    def stand(self, *_: object, **__: object) -> "Standing":
        self.is_there.set()
        self._go_on.wait(20.0)
        return self

    synchronize = record_event = pin_memory = to = copy_ = numpy = clone = stand

    def frame_of(self, call: Callable[[], Any], heartbeat: Heartbeat) -> tuple[str, bool, float]:
        """Where the thread stands by the record, whether that waits, and how long it may."""
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        assert self.is_there.wait(20.0)
        heartbeat._main = thread.ident
        record = heartbeat.record()
        self._go_on.set()
        thread.join(20.0)
        return record.frame, record.is_waiting, record.allowed_s


def inside(file: str, name: str) -> Callable[[Standing], None]:
    """A function of that name, as if it were from the file."""
    namespace: dict[str, Any] = {}
    exec(compile(f"def {name}(standing):\n    standing.stand()\n", file, "exec"), namespace)
    function: Callable[[Standing], None] = namespace[name]
    return function


@pytest.mark.parametrize("activity", ["learning", "loading", "saving", "between phases"])
@pytest.mark.parametrize(
    ("file", "name", "waits"),
    [
        ("/lib/torch/distributed/distributed_c10d.py", "all_reduce", True),
        ("/lib/deepspeed/comm/comm.py", "all_gather", True),
        ("/lib/torch/cuda/streams.py", "synchronize", True),
        ("/lib/torch/cuda/__init__.py", "synchronize", True),
        ("/lib/torch/cuda/streams.py", "record_event", False),
        ("/lib/torch/nn/functional.py", "linear", False),
    ],
)
def test_record__a_collective_and_a_synchronize_wait_whatever_the_activity(
    tmp_path: Path, activity: str, file: str, name: str, waits: bool
) -> None:
    heartbeat, standing = Heartbeat(tmp_path, 0), Standing()
    heartbeat.set_limit(5.0)
    for step in range(3):
        heartbeat.enter(activity, step)
        heartbeat.enter("exchange", step)
    heartbeat.enter(activity, 3)
    _, is_waiting, allowed_s = standing.frame_of(lambda: inside(file, name)(standing), heartbeat)
    assert is_waiting == waits
    between = {True: 5.0, False: FIRST_ALLOWED_S}[waits]
    wanted = {
        "saving": FIRST_ALLOWED_S,
        "loading": LOADING_ALLOWED_S,
        "between phases": between,
    }.get(activity, 5.0)
    assert allowed_s == wanted


@pytest.mark.parametrize(
    ("file", "function"),
    [("/lib/torch/_dynamo/convert_frame.py", "_compile"), ("/triton/compiler/compiler.py", "make")],
)
def test_record__a_step_that_compiles_may_take_long_whenever_it_comes(
    tmp_path: Path, file: str, function: str
) -> None:
    heartbeat, standing = Heartbeat(tmp_path, 0), Standing()
    heartbeat.set_limit(5.0)
    for step in range(4):
        heartbeat.enter("learning", step)
    compile_frame = inside(file, function)
    _, is_waiting, allowed_s = standing.frame_of(lambda: compile_frame(standing), heartbeat)
    assert not is_waiting and allowed_s == FIRST_ALLOWED_S
    assert heartbeat.record().allowed_s == 5.0


def test_record__who_waits_for_a_device_in_our_code_waits(tmp_path: Path) -> None:
    """As on a GPU where a collective hangs: the host stands at the flag of a step or at a copy, not in a collective."""

    def read_flag(standing: Standing) -> None:
        flag = AppliedFlag()
        flag.send(torch.ones((), dtype=torch.bool))
        flag._sent = standing  # type: ignore[assignment]
        flag.read()

    def copy(standing: Standing) -> None:
        loader: Any = Loader.__new__(Loader)
        loader._copying = (standing, [])
        loader._device = None
        with suppress(RuntimeError, ValueError, AssertionError):  # no GPU to record an event on
            loader._copied([])

    for call, name in ((read_flag, "read"), (copy, "_copied")):
        heartbeat, standing = Heartbeat(tmp_path, 0), Standing()
        heartbeat.enter("learning", 4, "small")
        frame, is_waiting, _ = standing.frame_of(lambda: call(standing), heartbeat)  # noqa: B023
        assert is_waiting and frame.endswith(f" in {name}")


def test_copies__are_functions_of_ours() -> None:
    modules = ("data.loader", "engine.engine", "train.faults", "train.student")
    found = {onto.__qualname__}
    for module in modules:
        for name, kind in vars(importlib.import_module(f"distill.{module}")).items():
            if isinstance(kind, type):
                found |= {f"{name}.{function}" for function in vars(kind)}
    assert not COPIES - found


def test_record__pauses_of_the_process_are_left_out(tmp_path: Path) -> None:
    """As after Ctrl-Z: neither the time that an activity stands nor the longest so far has the pause in it."""
    now = [100.0]
    heartbeat = Heartbeat(tmp_path, 0, clock=lambda: now[0])
    heartbeat.set_limit(5.0)
    heartbeat.note_beat()
    for step in range(3):
        heartbeat.enter("learning", step)
        now[0] += 1.0
        heartbeat.note_beat()
        now[0] += 3600.0  # the main thread may run before the heartbeat's does
        if step == 1:
            heartbeat.note_beat()
        assert heartbeat.record().idle_s == pytest.approx(1.5)
        heartbeat.enter("exchange", step)
        heartbeat.note_beat()
    heartbeat.enter("learning", 3)
    assert heartbeat.record().allowed_s == pytest.approx(SLOWER * 1.5)


STOPPED_GROUP = """
import sys, time
from pathlib import Path
from distill.runfolder.heartbeat import Heartbeat
from distill.launch.watchdog import Watchdog
folder = Path(sys.argv[2])
if sys.argv[1] == "rank":
    with Heartbeat(folder, 0) as heartbeat:
        heartbeat.set_limit(8.0)
        for step in range(3):
            heartbeat.enter("learning", step)
            heartbeat.enter("exchange", step)
        while True:
            heartbeat.enter("learning", 4)
            time.sleep(1.0)
watchdog, until = Watchdog(folder, 1, 8.0), time.monotonic() + 20.0
while time.monotonic() < until:
    report = watchdog.look()
    if report is not None:
        sys.exit(report.message)
    time.sleep(0.25)
"""


@pytest.mark.slow
def test_group__stopped_and_continued_gives_no_alarm(tmp_path: Path) -> None:
    """Ctrl-Z and fg: SIGSTOP and SIGCONT of a rank and its watcher together, longer than the limit."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STOPPED_GROUP]
    rank = subprocess.Popen([*command, "rank", str(tmp_path)], env=environment, process_group=0)
    try:
        watcher = subprocess.Popen(
            [*command, "watcher", str(tmp_path)],
            env=environment,
            process_group=rank.pid,
            stderr=subprocess.PIPE,
            text=True,
        )
        while read_record(tmp_path, 0) is None:
            time.sleep(0.1)
        time.sleep(2.0)
        os.killpg(rank.pid, signal.SIGSTOP)
        time.sleep(12.0)
        os.killpg(rank.pid, signal.SIGCONT)
        _, message = watcher.communicate(timeout=120.0)
        assert watcher.returncode == 0, message
        assert rank.poll() is None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()
