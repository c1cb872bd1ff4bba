"""Ranks of simulated nodes on a clock that does not wait: few of them read, and the right one is named all the same."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from distill.launch.board import FAILED, GONE
from distill.launch.node_watch import NodeWatch
from distill.launch.watchdog import StragglerReport
from distill.runfolder.failure import FILE
from distill.runfolder.heartbeat import (
    BEAT_S,
    publish_every_s,
    read_records,
    record_path,
)
from distill.runfolder.presence import GONE_LIMIT_S
from tests.support.status import LIMIT_S, SIGN

STRIDE_S = 2.0  # less than what counts as a pause
Change = Callable[[int], dict[str, object]]


class Nodes:
    """Some nodes of some ranks each, every rank with its part in watching."""

    def __init__(self, folder: Path, num_nodes: int, per_node: int) -> None:
        self.run, self.per_node, self.now = folder / "run", per_node, 1000.0
        self.run.mkdir()
        self.num_ranks = num_nodes * per_node
        self.boards = [folder / f"board-{node}" for node in range(num_nodes)]
        self.records = {
            rank: replace(SIGN, world_rank=rank, host=f"node{rank // per_node}", pid=rank + 2**23)
            for rank in range(self.num_ranks)
        }
        self.watches: dict[int, NodeWatch] = {}
        for rank in range(self.num_ranks):
            board = self.boards[rank // per_node]
            watch = NodeWatch(self.run, board, rank, self.num_ranks, clock=lambda: self.now)
            watch.judge_others(LIMIT_S)
            self.watches[rank] = watch

    def beat(
        self, stopped: Iterable[int] = (), change: Change = lambda _: {}
    ) -> StragglerReport | None:
        """One beat of every rank that is not stopped; what the first one found."""
        self.now += STRIDE_S
        beating = [rank for rank in self.records if rank not in stopped]
        for rank in beating:
            record = self.records[rank]
            self.records[rank] = replace(record, beat=record.beat + 1, **change(rank))  # type: ignore[arg-type]
            path = record_path(self.boards[rank // self.per_node], rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self.records[rank])))
            os.utime(path, (self.now, self.now))
        found = [self.watches[rank].look() for rank in beating]
        return next((report for report in found if report is not None), None)

    def beat_until_named(
        self, most_s: float, stopped: Iterable[int] = (), change: Change = lambda _: {}
    ) -> tuple[StragglerReport, float]:
        began = self.now
        while self.now - began < most_s:
            report = self.beat(stopped, change)
            if report is not None:
                return report, self.now - began
        raise AssertionError("nobody was named")


@pytest.fixture
def make_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Nodes]:
    def make(num_nodes: int, per_node: int) -> Nodes:
        nodes = Nodes(tmp_path, num_nodes, per_node)
        monkeypatch.setattr("time.time", lambda: nodes.now)
        for _ in range(3):
            assert nodes.beat() is None
        return nodes

    return make


def waiting_for(rank: int, nodes: Nodes) -> Change:
    """All others stand in a collective from now on."""
    began = nodes.now

    def change(other: int) -> dict[str, object]:
        idle_s = 0.0 if other == rank else nodes.now - began
        return {"idle_s": idle_s, "is_waiting": other != rank}

    return change


def test_look__a_calm_job_is_left_alone_and_every_node_publishes_one_file(
    make_nodes: Callable[[int, int], Nodes],
) -> None:
    nodes = make_nodes(3, 2)
    assert [nodes.beat() for _ in range(20)] == [None] * 20
    files = sorted(path.name for path in (nodes.run / "heartbeat").iterdir())
    assert files == ["node-00000.json", "node-00002.json", "node-00004.json"]
    assert read_records(nodes.run, 6) == list(nodes.records.values())


@pytest.mark.parametrize("victim", range(4))
def test_look__a_rank_that_is_silent_is_named_in_time_whoever_it_is(
    make_nodes: Callable[[int, int], Nodes], victim: int
) -> None:
    nodes = make_nodes(2, 2)
    report, seconds = nodes.beat_until_named(LIMIT_S, {victim}, waiting_for(victim, nodes))
    assert report.world_ranks == (victim,) and seconds <= LIMIT_S
    assert f"rank {victim} on node{victim // 2}: learning small, family step 40" in report.message


@pytest.mark.parametrize("victim", range(4))
def test_look__a_rank_that_does_not_move_is_named_with_where(
    make_nodes: Callable[[int, int], Nodes], victim: int
) -> None:
    nodes = make_nodes(2, 2)
    began = nodes.now
    stuck: Change = lambda rank: {"idle_s": nodes.now - began, "is_waiting": rank != victim}  # noqa: E731
    report, seconds = nodes.beat_until_named(LIMIT_S, (), stuck)
    assert report.world_ranks == (victim,) and seconds <= LIMIT_S
    assert report.message.endswith("in distill/train/student.py:90 in learn")


def test_look__where_all_wait_the_one_furthest_behind_is_named_across_nodes(
    make_nodes: Callable[[int, int], Nodes],
) -> None:
    nodes = make_nodes(3, 2)
    began = nodes.now

    def change(rank: int) -> dict[str, object]:
        step = 39 if rank == 3 else 40
        return {"idle_s": nodes.now - began, "is_waiting": True, "phase_step": step}

    report, seconds = nodes.beat_until_named(LIMIT_S, (), change)
    assert report.world_ranks == (3,) and seconds <= LIMIT_S
    assert report.message.startswith("every rank waits; furthest behind: rank 3 on node1")


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_look__a_node_that_is_gone_is_named(
    make_nodes: Callable[[int, int], Nodes], gone: int
) -> None:
    nodes = make_nodes(3, 2)
    stopped = {2 * gone, 2 * gone + 1}
    report, _ = nodes.beat_until_named(2 * LIMIT_S, stopped, waiting_for(2 * gone, nodes))
    assert set(report.world_ranks) == stopped
    assert f"rank {2 * gone} on node{gone}" in report.message


def test_look__in_a_large_job_records_of_others_may_be_late_without_an_alarm(
    make_nodes: Callable[[int, int], Nodes],
) -> None:
    """The seconds between two records that a node publishes are more than the limit; a node that is gone is named after them."""
    nodes = make_nodes(3, 1)
    for watch in nodes.watches.values():  # as if the other nodes were silent parts of a large job
        watch._late_s = lambda num_nodes: 2 * 40.0  # type: ignore[method-assign]
    began = nodes.now
    slow: Change = lambda rank: {"idle_s": nodes.now - began, "is_waiting": rank != 1}  # noqa: E731
    while nodes.now - began < 0.7 * LIMIT_S + 2 * 40.0:
        assert nodes.beat({1}, slow) is None
    report, _ = nodes.beat_until_named(LIMIT_S, {1}, slow)
    assert report.world_ranks == (1,)


def test_look__a_pause_of_all_is_forgiven(make_nodes: Callable[[int, int], Nodes]) -> None:
    nodes = make_nodes(2, 2)
    for _ in range(20):
        nodes.now += 3600.0
        assert [nodes.beat() for _ in range(3)] == [None] * 3


def test_look__a_rank_that_ended_is_not_waited_for(
    make_nodes: Callable[[int, int], Nodes],
) -> None:
    nodes = make_nodes(2, 2)
    assert nodes.beat((), lambda rank: {"end": "done"} if rank in {0, 3} else {}) is None
    assert [nodes.beat({0, 3}) for _ in range(30)] == [None] * 30
    ended = {record.world_rank for record in read_records(nodes.run, 4) if record.end}
    assert ended == {0, 3}


def test_look__a_failure_reaches_every_rank_through_its_board(
    make_nodes: Callable[[int, int], Nodes],
) -> None:
    nodes = make_nodes(2, 2)
    assert not any(watch.has_failed for watch in nodes.watches.values())
    (nodes.run / FILE).write_text("{}")
    for _ in range(2):
        nodes.beat()
    assert all(watch.has_failed for watch in nodes.watches.values())
    assert all((board / FAILED).exists() for board in nodes.boards)


def test_leave__publishes_how_ranks_ended(make_nodes: Callable[[int, int], Nodes]) -> None:
    nodes = make_nodes(1, 2)
    record = replace(nodes.records[1], beat=999, end="done")
    record_path(nodes.boards[0], 1).write_text(json.dumps(asdict(record)))
    nodes.watches[1].leave()
    assert read_records(nodes.run, 2)[1] == record


def test_publish_every__as_a_beat_in_small_jobs_and_seldom_in_large_ones() -> None:
    assert publish_every_s(1) == publish_every_s(8) == BEAT_S
    assert publish_every_s(512) == 32.0


def test_look__one_rank_of_each_node_finds_that_the_run_folder_is_gone_and_all_end(
    make_nodes: Callable[[int, int], Nodes], tmp_path: Path
) -> None:
    nodes = make_nodes(2, 3)
    nodes.run.rename(tmp_path / "elsewhere")
    began = nodes.now
    while not any(watch.gone_text() for watch in nodes.watches.values()):
        nodes.beat()
        assert nodes.now - began < GONE_LIMIT_S + 10.0
    assert nodes.now - began >= GONE_LIMIT_S
    nodes.beat()
    for watch in nodes.watches.values():
        assert watch.gone_text().startswith(f"{nodes.run}: the run folder is gone for ")
    (nodes.boards[0] / GONE).unlink()
    assert nodes.watches[0].gone_text(), "also where the memory of the node is full"
