"""Seconds on a GPU come from marks in its stream, read when it has passed them, without the waits for other ranks."""

import ast
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distill.engine.group_as_world import GroupAsWorld
from distill.train.exchange import AllGather, Pending, Slices
from distill.train.student import Stopwatch
from teacher.batch import Delivery
from teacher.peers import waiting_for_peers

COLLECTIVES = {"dist.all_reduce", "dist.all_gather", "dist.broadcast", "dist.all_to_all_single"}
ROOT = Path(__file__).parents[3]
GPU = torch.device("cuda", 0)


class Stream:
    """A stream whose work takes the seconds that a test gives it; the host asks how far it is."""

    def __init__(self) -> None:
        self.queued_s = self.passed_s = 0.0

    def event(self, *, enable_timing: bool) -> "Event":
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, stream: Stream) -> None:
        self.stream, self.at_s = stream, -1.0

    def record(self) -> None:
        self.at_s = self.stream.queued_s

    def query(self) -> bool:
        return self.stream.passed_s >= self.at_s

    def elapsed_time(self, other: "Event") -> float:
        assert self.query() and other.query(), "a GPU raises for what is not finished"
        return 1e3 * (other.at_s - self.at_s)

    def synchronize(self) -> None:
        raise AssertionError("nobody waits")


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    made = Stream()
    monkeypatch.setattr(torch.cuda, "Event", made.event)
    return made


def test_stopwatch__counts_what_the_stream_has_passed_and_never_waits(stream: Stream) -> None:
    clock = Stopwatch(GPU)
    for units, seconds in ((3, 2.0), (5, 4.0)):
        stream.queued_s += 1.0  # of others
        with clock.running(units):
            stream.queued_s += seconds
    assert (clock.read_s(), clock.units) == (0.0, 0)
    stream.passed_s = 3.5  # in the middle of the second span: units are those of the seconds
    assert (clock.read_s(), clock.units) == (2.0, 3)
    stream.passed_s = stream.queued_s
    assert (clock.read_s(), clock.units) == (6.0, 8)


def test_stopwatch__keeps_few_marks_where_nothing_reads_it(stream: Stream) -> None:
    clock = Stopwatch(GPU)
    for _ in range(100):
        with clock.running():
            stream.queued_s += 1.0
        stream.passed_s = stream.queued_s
    assert len(clock._spans) == 1


def test_stopwatch__waits_for_other_ranks_are_no_work(stream: Stream) -> None:
    clock = Stopwatch(GPU)
    with waiting_for_peers(GPU):  # outside of any work
        stream.queued_s += 9.0
    with clock.running():
        stream.queued_s += 2.0
        for _ in range(2):
            with waiting_for_peers(GPU):
                stream.queued_s += 5.0
        stream.queued_s += 1.0
    stream.passed_s = stream.queued_s
    assert clock.read_s() == pytest.approx(3.0)


def test_stopwatch__a_cpu_counts_all_that_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Stopwatch(torch.device("cpu"))
    with clock.running(4), waiting_for_peers(torch.device("cpu")):
        now[0] += 5.0
    assert (clock.read_s(), clock.units) == (5.0, 4)


class Late(dist.Work):
    """A collective for which the stream stands 7 s."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._stream.queued_s += 7.0
        return True


@pytest.mark.parametrize("way", [Slices, AllGather])
def test_exchange__its_wait_is_that_of_the_stream(way: Any, stream: Stream) -> None:
    exchange, delivery = way.__new__(way), mock.create_autospec(Delivery, instance=True)
    exchange._waits = Stopwatch(GPU)
    works: Any = (Late(stream), Late(stream))
    assert exchange.wait(Pending(works, lambda: delivery, ())) is delivery
    assert exchange.wait_s == 0.0
    stream.passed_s = stream.queued_s
    assert exchange.wait_s == pytest.approx(14.0)


def test_group_as_world__every_collective_of_deepspeed_is_a_wait(stream: Stream) -> None:
    class Backend:
        def all_reduce(self, tensor: Any, op: Any = None, group: Any = None) -> str:
            stream.queued_s += 6.0
            return "reduced"

    group = mock.create_autospec(dist.ProcessGroup, instance=True)
    world, clock = GroupAsWorld(Backend(), group, GPU), Stopwatch(GPU)
    with clock.running():
        stream.queued_s += 1.0
        assert world.all_reduce(None) == "reduced"
    stream.passed_s = stream.queued_s
    assert clock.read_s() == pytest.approx(1.0)


def unmarked(path: Path) -> Iterator[str]:
    """Functions of a file with a collective that is not inside ``waiting_for_peers``."""
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        marked = {
            id(call)
            for node in ast.walk(function)
            if isinstance(node, ast.With)
            and "waiting_for_peers" in ast.unparse(node.items[0].context_expr)
            for call in ast.walk(node)
        }
        for call in ast.walk(function):
            is_collective = isinstance(call, ast.Call) and ast.unparse(call.func) in COLLECTIVES
            if is_collective and id(call) not in marked:
                yield f"{path.name}: {function.name}"


def test_step__every_collective_of_it_is_marked() -> None:
    files = [
        *(ROOT / "teacher").glob("*.py"),
        *(ROOT / "students").glob("*.py"),
        ROOT / "distill/engine/engine.py",
    ]
    # that is asked between steps, when the host waits anyway
    assert [each for path in files for each in unmarked(path)] == ["engine.py: is_finite"]
