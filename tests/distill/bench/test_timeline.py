"""The simulated clock is that of the real loop, and blocks of steps are as long as the steps one by one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from inspect import unwrap
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distill.bench.simulate import BLOCK, Chances, rhythm_of, simulate_steps
from distill.bench.stand_ins import Unsaved
from distill.bench.timeline import Timeline, drawn, jitter_factors
from distill.plan.placement import NetworkCost
from distill.plan.plan import Placement, Plan, PlanOptions, make_plan
from distill.train.balance import BalanceListener, Balancer
from distill.train.by_step import PlanSchedule
from distill.train.groups import make_groups
from distill.train.loop import run_phase
from distill.train.phase import Decision, Phase
from distill.train.student import Stopwatch
from tests.support.spawn import on_ranks

STEPS, EVERY, LOOKAHEAD, JITTER, SLOW = 100, 20, 2, 0.1, 1.4
EXCHANGE_S = 0.5


def plan_of(num_ranks: int, lookahead: int = LOOKAHEAD, *, even: bool = False) -> Plan:
    works = [NetworkCost(name, each) for name, each in (("a", 0.2), ("b", 0.3), ("c", 0.6))]
    options = PlanOptions(lookahead=lookahead, has_even_shares=even)
    return make_plan(works, 1.0, 64, num_ranks, options)


class Clock:
    """Where a rank of the real loop is; all of its work and waits set it."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.now_s, self.rank, self.factor = 0.0, rank, 1.0
        draw = drawn(7, JITTER, plan.num_ranks)
        self.factors = (draw()[rank] * (SLOW if rank == 1 else 1.0) for _ in range(STEPS))

    def meet(self, group: dist.ProcessGroup | None) -> None:
        latest = torch.tensor([self.now_s], dtype=torch.float64)
        dist.all_reduce(latest, dist.ReduceOp.MAX, group=group)
        self.now_s = float(latest)


class Watch(Stopwatch):
    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.seconds = 0.0

    @contextmanager
    def running(self, units: int = 0) -> Iterator[None]:
        self.units += units
        yield

    def read_s(self) -> float:
        return self.seconds


class Exchange:
    wants_all_patches, received_bytes, wait_s = False, 0, 0.0

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def start(self, outgoing: Any) -> Any:
        posted = torch.tensor([self.clock.now_s], dtype=torch.float64)
        return posted, dist.all_reduce(posted, dist.ReduceOp.MAX, async_op=True)

    def wait(self, pending: Any) -> None:
        posted, work = pending
        work.wait()
        self.clock.now_s = max(self.clock.now_s, float(posted) + EXCHANGE_S)


class Trainer:
    """A network that takes its planned time on a set clock, then meets its group."""

    def __init__(self, clock: Clock, placement: Placement, image_s: float, group: Any) -> None:
        self.clock, self.name, self.group = clock, placement.name, group
        self.images, self.training = placement.slice_of(clock.rank), Watch()
        self.image_s = image_s

    def train_step(self, batch: object, numbers: object) -> None:
        seconds = len(self.images) * self.image_s * self.clock.factor
        self.training.seconds += seconds
        self.clock.now_s += seconds
        self.clock.meet(self.group)


def on_set_clocks() -> list[float]:
    """When this rank ends each step of the real loop with the real balancer."""
    rank, plan = dist.get_rank(), plan_of(dist.get_world_size())
    groups, schedule = make_groups(plan, timedelta(seconds=60)), PlanSchedule(plan)
    clock, teaching, ends = Clock(plan, rank), Watch(), list[float]()

    def fetch(step: int) -> Any:
        share = schedule.at(step).share(rank, step)
        return SimpleNamespace(global_crops=torch.zeros(len(share)))

    def teach(crops: Any, masks: object) -> None:
        clock.factor = next(clock.factors)
        seconds = len(crops.global_crops) * plan.teach_s * clock.factor
        teaching.seconds += seconds
        clock.now_s += seconds

    def record(phase: Phase, step: int, faults: Callable[[], Sequence[float]]) -> Decision:
        ends.append(clock.now_s)
        return Decision(save=False, stop=False)

    trainers = tuple(
        Trainer(clock, placement, image_s, groups.by_network[placement.name])
        for placement, image_s in zip(plan.placements, plan.image_s, strict=True)
        if rank in placement.world_ranks
    )
    balancer = Balancer(
        schedule,
        groups.control,
        SimpleNamespace(make_room=lambda most: None),  # type: ignore[arg-type]  # a loader
        (teaching, {each.name: each.training for each in trainers}),
        lookahead=LOOKAHEAD,
        every=EVERY,
        listener=BalanceListener(lambda _: None, lambda _: None),
    )
    masks = SimpleNamespace(of_share=None, of_required=None, counts=None)
    phase = SimpleNamespace(
        num_steps=STEPS,
        first_step=0,
        lookahead=LOOKAHEAD,
        plan=plan,
        loader=SimpleNamespace(fetch=fetch),
        masks=SimpleNamespace(draw=lambda step: masks),
        teacher=SimpleNamespace(teach=teach),
        teaching=teaching,
        exchange=Exchange(clock),
        schedule=SimpleNamespace(at=lambda step: SimpleNamespace(grid_hw=(1, 1))),
        trainers=trainers,
        after_step=balancer.after_step,
    )
    faults = SimpleNamespace(
        is_training=lambda *_: True, watch=lambda *_: None, counts=lambda: [0.0]
    )
    heartbeat = SimpleNamespace(enter=lambda *_: None)
    anything: Any = (phase, SimpleNamespace(record=record), Unsaved(), faults, heartbeat)
    with (
        patch("distill.train.loop.student_batch", lambda *_: None),
        patch("distill.train.loop.Outgoing", lambda *_: None),
    ):
        assert unwrap(run_phase)(*anything, 0)  # past beartype
    return ends


def test_timeline__is_the_clock_of_the_real_loop_and_its_balance() -> None:
    """Four ranks, one of them slow, groups of one and of two; shares change three times and more."""
    ranks = on_ranks(4, on_set_clocks)
    plan = plan_of(4)
    assert max(len(each.slices) for each in plan.placements) > 1, "a group that has to meet"
    pace = np.array([1.0, SLOW, 1.0, 1.0])
    factors = drawn(7, JITTER, 4)
    timeline = Timeline(plan, LOOKAHEAD, factors, every=EVERY, exchange_s=EXCHANGE_S, pace=pace)
    times = timeline.run(0, STEPS)
    assert times.end_s == pytest.approx(np.max(ranks, axis=0), rel=1e-12)
    assert timeline.plan.exact_shares[1] < 0.9 * plan.exact_shares[1]


def test_jitter_factors__have_mean_one_and_the_deviation() -> None:
    factors = jitter_factors(np.random.default_rng(0), 0.2, 200_000)
    assert factors.mean() == pytest.approx(1.0, abs=2e-3)
    assert factors.std() == pytest.approx(0.2, rel=0.01)
    assert (jitter_factors(np.random.default_rng(0), 0.0, 5) == 1.0).all()


def test_timeline__without_jitter_even_shares_take_what_the_plan_says() -> None:
    plan = plan_of(4, 0, even=True)
    times = Timeline(plan, 0, drawn(0, 0.0, 4)).run(0, 50)
    assert times.step_s == pytest.approx(max(plan.even_load_s))
    assert times.share("work_s") == pytest.approx(plan.utilisation_even_barrier)


def test_timeline__all_time_is_work_or_a_wait() -> None:
    times = Timeline(plan_of(5), LOOKAHEAD, drawn(3, JITTER, 5)).run(0, 400)
    parts = [times.share(name) for name in ("work_s", "exchange_wait_s", "group_wait_s")]
    assert sum(parts) == pytest.approx(1.0, abs=0.01)  # ranks end the first and last step apart
    assert min(parts) > 0


@pytest.mark.parametrize("lookahead", [0, LOOKAHEAD])
def test_blocks__are_as_long_as_steps_one_by_one(lookahead: int) -> None:
    """20,000 steps of five ranks in blocks, from 1,000 steps with another seed."""
    plan = plan_of(5, lookahead)
    engine = SimpleNamespace(lookahead=lookahead, balance=EVERY)
    recipe: Any = SimpleNamespace(engine=engine)
    few = unwrap(simulate_steps)(plan, recipe, Chances(JITTER, 1.0, 1.0, 1), 0.0)
    rhythm = rhythm_of(few)
    blocks_s = rhythm.sample(np.random.default_rng(2), BLOCK, 20_000 // BLOCK).sum()
    one_by_one = Timeline(plan, lookahead, drawn(5, JITTER, 5), every=EVERY).run(0, 20_000)
    assert blocks_s == pytest.approx(one_by_one.end_s[-1], rel=0.005)
