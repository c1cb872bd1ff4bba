"""A slow step is no hang, and a hang is found: simulated ranks on a clock that does not wait."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from distill.launch.watchdog import MARGIN, StragglerReport, Watchdog
from distill.runfolder.heartbeat import (
    FIRST_ALLOWED_S,
    LOADING_ALLOWED_S,
    SELDOM,
    SLOWER,
    Heartbeat,
    HeartbeatRecord,
)

LIMIT_S = 30.0
BEAT_S = 2.0
NETWORKS = ("small", "large")
# Activities of a step with a network where there is one, and their usual seconds
STEP = (
    ("loading", "", 2.0),
    ("teaching", "", 34.0),
    ("learning", "small", 9.0),
    ("learning", "large", 20.0),
    ("saving", "", 40.0),
)


class Rank:
    """One rank's heartbeat on a clock that the test sets; beats as often as it is looked at."""

    def __init__(self, folder: Path, world_rank: int) -> None:
        self.now, self.beat = 0.0, 0
        self.heartbeat = Heartbeat(folder, world_rank, clock=lambda: self.now)
        self.heartbeat._main = 0  # looking for the frame of the test takes most of the time
        self.heartbeat.set_limit(LIMIT_S)
        self.heartbeat.enter_phase("family", 0)

    def record(self, *, is_waiting: bool | None = None) -> HeartbeatRecord:
        self.beat += 1
        record = replace(self.heartbeat.record(), beat=self.beat)
        return record if is_waiting is None else replace(record, is_waiting=is_waiting)


def judge(watchdog: Watchdog, ranks: list[Rank], now: float) -> StragglerReport | None:
    for rank in ranks:
        rank.now = now
    watchdog._looked = now  # it looked all the time
    return watchdog.judge([rank.record() for rank in ranks])


@pytest.mark.parametrize("num_steps", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_judge__no_slow_step_of_many_is_an_alarm(tmp_path: Path, num_steps: int) -> None:
    """Each step takes up to five times the longest before it; the first ones take long, as where kernels are compiled."""
    draw, alarms = random.Random(0), []
    rank, longest = Rank(tmp_path, 0), {}
    watchdog = Watchdog(tmp_path, 1, LIMIT_S, clock=lambda: rank.now)
    for step in range(num_steps):
        activity, network, usual_s = STEP[step % 4]
        key = (activity, network)
        took_s = usual_s * draw.uniform(0.5, 1.0)
        if draw.random() < 0.01 and longest.get(key, 0.0) < 1e6:
            took_s = max(took_s, 5.0 * longest.get(key, usual_s))
        rank.heartbeat.enter(activity, step, network)
        rank.now += took_s
        if (
            took_s > longest.get(key, 0.0) or step % 50 == 0
        ):  # at its end, when it has stood longest
            watchdog._looked = rank.now  # it looked all the time
            report = watchdog.judge([rank.record()])
            alarms += [] if report is None else [(step, took_s, report.message)]
        longest[key] = max(longest.get(key, 0.0), took_s)
    assert not alarms
    assert max(longest.values()) > 1e6, "five times again and again"


def test_judge__a_first_long_step_counts(tmp_path: Path) -> None:
    rank = Rank(tmp_path, 0)
    for seconds in (34.0, 36.0, 33.0, 5 * 36.0):
        rank.heartbeat.enter("teaching", 0)
        rank.now += seconds
        record = rank.record()
        assert record.idle_s == seconds < MARGIN * record.allowed_s
        rank.heartbeat.enter("exchange", 0)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 5))]
)
def test_judge__every_hang_is_found_and_the_right_rank_named(tmp_path: Path, seed: int) -> None:
    """Ten hangs of one of four ranks in any activity; the others wait for it in an exchange or inside a collective."""
    draw = random.Random(seed)
    for index in range(10):
        folder = tmp_path / str(index)
        ranks = [Rank(folder, world_rank) for world_rank in range(4)]
        now = [0.0]
        watchdog = Watchdog(folder, 4, LIMIT_S, clock=lambda now=now: now[0])
        for step in range(draw.randrange(3, 9)):
            for activity, network, usual_s in STEP:
                for rank in ranks:
                    rank.heartbeat.enter(activity, step, network)
                now[0] += usual_s * draw.uniform(0.5, 1.0)
                assert judge(watchdog, ranks, now[0]) is None
        hung, waiting = draw.choice(ranks), draw.choice(("exchange", "agreeing", "learning"))
        activity, network, usual_s = draw.choice(STEP)
        for rank in ranks:
            rank.heartbeat.enter(activity if rank is hung else waiting, 9, network)
        began, report = now[0], None
        while report is None and now[0] - began < FIRST_ALLOWED_S:
            now[0] += BEAT_S
            for rank in ranks:
                rank.now = now[0]
            records = [rank.record(is_waiting=rank is not hung) for rank in ranks]
            report = watchdog.judge(records)
        assert report is not None and report.world_ranks == (ranks.index(hung),)
        loading_s = LOADING_ALLOWED_S if activity == "loading" else 0.0
        allowed_s = (
            FIRST_ALLOWED_S if activity in SELDOM else max(LIMIT_S, loading_s, SLOWER * usual_s)
        )
        assert now[0] - began <= MARGIN * allowed_s + BEAT_S
