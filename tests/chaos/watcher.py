"""What watching costs: CPU of a node and file operations on the shared folder, at many nodes, now and as before.

Some of the nodes are simulated in full, on a clock that does not wait: every rank's beat and its part in
watching, the real code over real files. The first and the last node, which read the others, are among
them; the other nodes' files lie there. Operations are counted at the calls of ``os`` by path.
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.launch.board import MEMORY
from distill.launch.node_watch import NodeWatch
from distill.launch.watchdog import Watchdog
from distill.runfolder.failure import FILE
from distill.runfolder.heartbeat import (
    BEAT_S,
    Heartbeat,
    HeartbeatRecord,
    publish_every_s,
    publish_records,
    record_path,
)
from tests.support.status import LIMIT_S, SIGN

COUNTED = ("open", "pwrite", "read", "close", "stat", "scandir", "mkdir", "unlink")
START_S, URGENT_FOR_S = 4.0, 16.0
OTHERS_S = 8.0  # at least, between two signs of life of the nodes that are not simulated
MOST_OPERATIONS = 100.0  # a second, of all nodes
MOST_LOOKS = (
    1.0  # CPU of a node's ranks at a beat, in looks of one rank as before, on the same machine
)


class Operations:
    """Counts calls of ``os`` that reach a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._descriptors, self.count = str(folder), set[int](), 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        before = {name: getattr(os, name) for name in COUNTED}
        for name, function in before.items():
            setattr(os, name, self._wrapped(name, function))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(os, name, function)

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            is_file = isinstance(first, int)
            is_there = (
                first in self._descriptors if is_file else str(first).startswith(self._folder)
            )
            self.count += is_there
            if is_file and name == "close":
                self._descriptors.discard(first)
            result = function(first, *args, **kwargs)
            if is_there and name == "open":
                self._descriptors.add(result)
            return result

        return call


class Node:
    """The ranks of a node: their beats, and their parts in watching."""

    def __init__(self, run: Path, board: Path, ranks: range, num_ranks: int, now: list[float]):
        clock = lambda: now[0]  # noqa: E731
        self.watches = [NodeWatch(run, board, rank, num_ranks, clock=clock) for rank in ranks]
        self.beats = [Heartbeat(board, rank, clock=clock) for rank in ranks]
        (board / "heartbeat").mkdir(parents=True)
        for watch, beat in zip(self.watches, self.beats, strict=True):
            watch.judge_others(LIMIT_S)
            beat.set_limit(LIMIT_S)
            beat.enter_phase("family", 0)
            self.move(beat, 0)
        self.cpu_s = 0.0

    @staticmethod
    def move(beat: Heartbeat, step: int) -> None:
        for activity in ("teaching", "exchange", "learning"):
            beat.enter(activity, step, "small")

    def live(self, step: int | None) -> int:
        """One beat of every rank, the files of the real thing; how many reports. ``step`` is None while they stand."""
        began = time.process_time()
        for beat in self.beats:
            beat.note_beat()
            if step is not None:
                self.move(beat, step)
            beat._write()
        reports = [watch.look() for watch in self.watches]
        self.cpu_s += time.process_time() - began
        return sum(report is not None for report in reports)


def run(arguments: list[str]) -> bool:
    """True when a target was missed, or a rank was named that had done nothing."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos watcher", description=__doc__)
    parser.add_argument("--nodes", type=int, default=512)
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--simulated", type=int, default=6, help="nodes that live in full")
    parser.add_argument("--seconds", type=float, default=400.0, help="of the simulated clock")
    parser.add_argument("--before-looks", type=int, default=20)
    parser.add_argument(
        "--most-core", type=float, default=None, help="percent of this machine's core"
    )
    options = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory() as disk,
        tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as memory,
    ):
        per_look_s, before = measure_before(Path(disk) / "before", options)
        results, wrong = measure_now(Path(disk) / "run", Path(memory), options, per_look_s / BEAT_S)
    num_ranks = options.nodes * options.per_node
    print(f"watcher: {num_ranks} ranks on {options.nodes} nodes of {options.per_node}")
    print(
        f"  before: one look {1e3 * per_look_s:.0f} ms of CPU, {100 * per_look_s / BEAT_S:.0f}% of a core "
        f"in each of two ranks that train; {before:,.0f} file operations/s"
    )
    for line in results:
        print(f"  {line}")
    for line in wrong:
        print(f"  wrong: {line}")
    return bool(wrong)


def measure_before(run_folder: Path, options: argparse.Namespace) -> tuple[float, float]:
    """CPU seconds of one look at every rank's file, as two ranks did at every beat, and all operations a second."""
    num_ranks = options.nodes * options.per_node
    (run_folder / "heartbeat").mkdir(parents=True)
    operations = Operations(run_folder)
    with operations.counting():
        for rank in range(num_ranks):
            beat = Heartbeat(run_folder, rank)
            beat._write()
            (run_folder / FILE).exists()
    per_beat = operations.count
    watchdog = Watchdog(run_folder, num_ranks, LIMIT_S)
    began = time.process_time()
    for _ in range(options.before_looks):
        records = [read_as_before(run_folder, rank) for rank in range(num_ranks)]
        watchdog.judge(records)
    per_look_s = (time.process_time() - began) / options.before_looks
    read = 3 * num_ranks  # open, read, close
    return per_look_s, (per_beat + 2 * read) / BEAT_S


def read_as_before(run_folder: Path, rank: int) -> HeartbeatRecord:
    return HeartbeatRecord(**json.loads(record_path(run_folder, rank).read_bytes()))


def measure_now(
    run_folder: Path, memory: Path, options: argparse.Namespace, look_core: float
) -> tuple[list[str], list[str]]:
    """Lines of figures, and what missed its target: a calm job, then one whose ranks all stand in a collective.

    ``look_core`` is the part of a core that looking as before took: a bound that a slow machine keeps too.
    """
    run_folder.mkdir()
    job = Job(run_folder, memory, options)
    job.live(START_S)
    calm = job.live(options.seconds)
    job.stand()
    job.live(LIMIT_S)
    urgent = job.live(URGENT_FOR_S)
    lines = [
        f"now: {calm.text()}",
        f"while every rank stands for longer than it may: {urgent.text()}",
        f"({options.seconds:.0f} simulated seconds; {len(job.nodes)} nodes in full, the others counted by them)",
    ]
    wrong = ["a rank that had done nothing was named"] * job.num_reports
    core = max(calm.inner_core, calm.end_core)
    if core > MOST_LOOKS * look_core:
        wrong.append(f"more of a core than {MOST_LOOKS:g} times one rank's look before")
    if options.most_core is not None and 100 * core > options.most_core:
        wrong.append(f"more than {options.most_core:g}% of a core")
    if calm.per_s > MOST_OPERATIONS:
        wrong.append(f"more than {MOST_OPERATIONS:g} file operations/s")
    return lines, wrong


@dataclass(frozen=True)
class Cost:
    """Parts of a core, of a node in the middle and of the first or last one; file operations a second of all nodes."""

    inner_core: float
    end_core: float
    per_s: float

    def text(self) -> str:
        return (
            f"{100 * self.inner_core:.2f}% of a core for each node, {100 * self.end_core:.2f}% on the first "
            f"and the last (beats and watching of all its ranks); {self.per_s:.0f} file operations/s"
        )


class Job:
    """The nodes that are simulated in full, and the files of the others."""

    def __init__(self, run_folder: Path, memory: Path, options: argparse.Namespace) -> None:
        self.options, self.now, self.num_reports, self.beat = options, [1000.0], 0, 0
        self.run, self.operations = run_folder, Operations(run_folder)
        self.others_due = 0.0
        self.is_standing, num_ranks = False, options.nodes * options.per_node
        chosen = sorted({0, options.nodes - 1, *range(1, options.simulated - 1)})
        self.nodes = {
            node: Node(run_folder, memory / str(node), ranks_of(node, options), num_ranks, self.now)
            for node in chosen
        }

    def stand(self) -> None:
        """Every rank enters an exchange and stays in it."""
        self.is_standing = True
        for node in self.nodes.values():
            for beat in node.beats:
                beat.enter("exchange", self.beat, "small")

    def live(self, seconds: float) -> Cost:
        """Some seconds of all ranks."""
        counts, num_beats = Counter[int](), int(seconds / BEAT_S)
        cpu_s = {number: node.cpu_s for number, node in self.nodes.items()}
        for _ in range(num_beats):
            if self.now[0] >= self.others_due:
                self._publish_others()
            self.now[0] += BEAT_S
            self.beat += 1
            for number, node in self.nodes.items():
                before = self.operations.count
                with self.operations.counting():
                    self.num_reports += node.live(None if self.is_standing else self.beat)
                counts[number] += self.operations.count - before
        cores = {
            number: (node.cpu_s - cpu_s[number]) / seconds for number, node in self.nodes.items()
        }
        ends = {0, self.options.nodes - 1}
        inner = [number for number in self.nodes if number not in ends]
        per_inner = sum(counts[number] for number in inner) / len(inner)
        total = per_inner * (self.options.nodes - 2) + sum(counts[number] for number in ends)
        inner_core = sum(cores[number] for number in inner) / len(inner)
        return Cost(inner_core, max(cores[number] for number in ends), total / seconds)

    def _publish_others(self) -> None:
        self.others_due = self.now[0] + max(OTHERS_S, publish_every_s(self.options.nodes))
        for node in set(range(self.options.nodes)) - self.nodes.keys():
            ranks = ranks_of(node, self.options)
            records = [replace(SIGN, world_rank=rank, beat=self.beat) for rank in ranks]
            publish_records(self.run, records)


def ranks_of(node: int, options: argparse.Namespace) -> range:
    return range(node * options.per_node, (node + 1) * options.per_node)
