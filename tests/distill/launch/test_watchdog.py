import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from distill.launch.watchdog import StragglerReport, Watchdog
from distill.runfolder.failure import LOST_EXIT_CODE
from distill.runfolder.heartbeat import FIRST_ALLOWED_S, record_path
from tests.support.status import LIMIT_S, SIGN

STRIDE_S = 2.5


class Job:
    """Signs of two ranks on a clock of its own; ranks beat unless they are said not to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now, self.states = folder, 0.0, dict[int, str]()
        self.records = {rank: replace(SIGN, world_rank=rank) for rank in range(2)}
        self.watchdog = Watchdog(
            folder,
            2,
            LIMIT_S,
            clock=lambda: self.now,
            state_of=lambda s: self.states.get(s.pid, "S"),
        )

    def look(
        self, after_s: float = 0.0, beating: tuple[int, ...] = (0, 1)
    ) -> StragglerReport | None:
        while after_s > STRIDE_S:  # a watcher that looks less often was stopped
            self.look(STRIDE_S, beating)
            after_s -= STRIDE_S
        self.now += after_s
        for rank, record in self.records.items():
            self.records[rank] = replace(record, beat=record.beat + (rank in beating))
            path = record_path(self.folder, rank)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(asdict(self.records[rank])))
        return self.watchdog.look()

    def change(self, rank: int, **values: object) -> None:
        self.records[rank] = replace(self.records[rank], **values)  # type: ignore[arg-type]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    made = Job(tmp_path)
    assert made.look() is None
    return made


def test_look__a_moving_job_is_left_alone(job: Job) -> None:
    assert [job.look(10.0) for _ in range(9)] == [None] * 9


def test_look__a_rank_without_a_sign_of_life_is_named_within_the_limit(job: Job) -> None:
    job.change(0, activity="exchange", is_waiting=True, idle_s=26.0)
    assert job.look(20.0, beating=(0,)) is None
    stragglers = job.look(5.0, beating=(0,))
    assert stragglers is not None and stragglers.world_ranks == (1,)
    said = "rank 1 on node1: learning small, family step 40; no record of life for 25 s"
    assert stragglers.message == said
    failure = stragglers.to_failure(job.folder)
    assert failure.exit_code == LOST_EXIT_CODE and "stacks" in failure.fix


def test_look__a_stopped_process_is_named_even_in_a_long_activity(job: Job) -> None:
    job.change(1, activity="saving", allowed_s=FIRST_ALLOWED_S)
    assert job.look(25.0, beating=(0,)) is None
    job.states[100] = "T"
    stragglers = job.look(1.0, beating=(0,))
    assert stragglers is not None and "its process is stopped for 26 s" in stragglers.message


def test_look__who_is_waited_for_is_named_and_not_who_waits(job: Job) -> None:
    job.change(0, idle_s=300.0, is_waiting=True)
    job.change(1, idle_s=20.0)
    assert job.look(1.0) is None
    job.change(1, idle_s=25.0)
    stragglers = job.look(1.0)
    assert stragglers is not None and stragglers.world_ranks == (1,)
    assert "does not move for 25 s, in distill/train/student.py:90 in learn" in stragglers.message


def test_look__those_who_wait_for_a_long_save_are_not_hung(job: Job) -> None:
    job.change(0, idle_s=300.0, is_waiting=True)
    job.change(1, activity="saving", idle_s=300.0, allowed_s=FIRST_ALLOWED_S)
    assert job.look(1.0) is None


def test_look__when_all_wait_the_ones_furthest_behind_are_named(job: Job) -> None:
    job.change(0, idle_s=30.0, is_waiting=True)
    job.change(1, idle_s=30.0, is_waiting=True, phase_step=39)
    stragglers = job.look(1.0)
    assert stragglers is not None and stragglers.world_ranks == (1,)
    assert stragglers.message.startswith("every rank waits; furthest behind: rank 1")


def test_look__a_rank_that_ended_is_not_waited_for(job: Job) -> None:
    job.change(1, end="done")
    assert [job.look(100.0, beating=(0,)) for _ in range(3)] == [None] * 3


def test_look__a_rank_that_never_came_is_named(tmp_path: Path) -> None:
    now = [0.0]
    clock: Callable[[], float] = lambda: now[0]  # noqa: E731
    watchdog = Watchdog(tmp_path, 2, LIMIT_S, clock=clock)
    assert watchdog.look() is None
    stragglers = None
    while stragglers is None:
        now[0] += 1.0
        stragglers = watchdog.look()
    assert now[0] == FIRST_ALLOWED_S + 1.0
    assert stragglers is not None and "no record of rank 0, 1 after 601 s" in stragglers.message


def test_look__furthest_behind_is_the_rank_in_the_earlier_phase(job: Job) -> None:
    """A step of the second phase is later than any step of the first, however small its number."""
    job.look()
    for rank, phase, number, step in ((0, "gram", 2, 3), (1, "base", 1, 90)):
        waiting = {"idle_s": 2 * LIMIT_S, "is_waiting": True, "activity": "exchange"}
        job.change(rank, phase=phase, phase_number=number, phase_step=step, **waiting)
    stragglers = job.look(1.0)
    assert stragglers is not None and stragglers.world_ranks == (1,)
    assert "base step 90" in stragglers.message


def test_look__a_pause_of_the_watcher_is_forgiven(job: Job) -> None:
    """Ctrl-Z: nothing looked and nothing beat for a minute; what then stays silent is named all the same."""
    job.look(20.0, beating=())
    job.now += 60.0
    assert job.look(0.0, beating=()) is None
    assert job.look(20.0, beating=()) is None
    stragglers = job.look(7.0, beating=(0,))
    assert stragglers is not None and stragglers.world_ranks == (1,)


def test_look__pauses_again_and_again_are_forgiven(job: Job) -> None:
    for _ in range(20):
        job.now += 40.0
        assert job.look(0.0, beating=()) is None
