"""When every rank of a family's job teaches, waits and trains, step by step on a simulated clock.

The steps are those of ``distill.train.loop``: shares come from the plan in force at the step, look-ahead fills
first, live balance is ``distill.train.balance.MeasuredShares`` itself. What is simulated are three waits: a
rank meets its network's group after every step, all ranks at the exchange of a step that is due, and
nothing else. A test runs the real loop on set clocks and finds the same times.

Jitter: the work of a rank between two meetings of its group takes its planned seconds times a log-normal
factor of mean 1, another one for every rank and step, of which nothing is known in advance.
"""

import math
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.plan.plan import Plan
from distill.train.balance import BalanceListener, MeasuredShares
from distill.train.by_step import PlanSchedule

Seconds = NDArray[np.float64]
Factors = Callable[[], Seconds]
COLUMNS = ("end_s", "work_s", "exchange_wait_s", "group_wait_s", "spread_s")


def jitter_factors(generator: np.random.Generator, jitter: float, count: int) -> Seconds:
    """Log-normal factors of mean 1 whose standard deviation is ``jitter``, [count]."""
    variance = math.log1p(jitter * jitter)
    return np.exp(generator.normal(-0.5 * variance, math.sqrt(variance), count))


def drawn(seed: int, jitter: float, num_ranks: int) -> Factors:
    """Factors for all ranks, other ones at every call, the same for a seed."""
    generator = np.random.default_rng(seed)
    return lambda: jitter_factors(generator, jitter, num_ranks)


@dataclass(frozen=True)
class StepTimes:
    """What some steps took, a row each, all [steps].

    ``end_s``: when the last rank was done. Seconds of all ranks together: ``work_s`` of teaching and training,
    ``exchange_wait_s`` and ``group_wait_s`` waited. ``spread_s``: from the first rank that posted the step's exchange to the last.
    """

    num_ranks: int
    end_s: Seconds
    work_s: Seconds
    exchange_wait_s: Seconds
    group_wait_s: Seconds
    spread_s: Seconds

    def between(self, first: int, end: int) -> "StepTimes":
        """The same of some of the steps."""
        return StepTimes(self.num_ranks, *(getattr(self, name)[first:end] for name in COLUMNS))

    @property
    def step_s(self) -> float:
        """Mean seconds from the end of the first step to that of the last."""
        return float(self.end_s[-1] - self.end_s[0]) / (len(self.end_s) - 1)

    def share(self, name: str) -> float:
        """Part of the time of all ranks that a column takes."""
        total_s = (self.end_s[-1] - self.end_s[0]) * self.num_ranks
        return float(getattr(self, name)[1:].sum() / total_s)

    def block_s(self, length: int) -> Seconds:
        """Seconds of consecutive blocks of ``length`` steps; what is left at the end is not counted."""
        return np.diff(self.end_s[::length])


class _Clocks:
    """What live balance reads: images and seconds of teaching and seconds of each network's training, of every rank."""

    def __init__(self, plan: Plan) -> None:
        self.images, self.teach_s = np.zeros(plan.num_ranks), np.zeros(plan.num_ranks)
        self.train_s = np.zeros((len(plan.placements), plan.num_ranks))

    def count(self, images: NDArray[np.int64], seconds: Seconds) -> None:
        """Adds the teaching of a step."""
        self.images = self.images + images
        self.teach_s = self.teach_s + seconds

    def since(self, before: "Seconds", steps: int) -> list[list[float]]:
        """Of every rank, seconds per image and of each network per step."""
        images, teach_s, *train_s = self.read() - before
        per_image = np.divide(teach_s, images, out=np.zeros_like(teach_s), where=images > 0)
        rows: list[list[float]] = np.stack(
            [per_image, *(each / steps for each in train_s)]
        ).T.tolist()
        return rows

    def read(self) -> Seconds:
        """All of them, [2 + networks, ranks]."""
        return np.concatenate([self.images[None], self.teach_s[None], self.train_s])


class Timeline:
    """One phase of a family's job on all ranks. ``clock_s``: where each rank is, [ranks]; ``marks``: where they were."""

    def __init__(
        self,
        plan: Plan,
        lookahead: int,
        factors: Factors,
        *,
        every: int = 0,
        exchange_s: float = 0.0,
        pace: Seconds | None = None,
    ) -> None:
        """``factors``: of every rank's work. ``every``: steps between two measurements of live balance, 0 for none.

        ``exchange_s``: from the last post of a step to its delivery. ``pace``: lasting factors of slow ranks.
        """
        self._plan_schedule, self._lookahead, self._factors = PlanSchedule(plan), lookahead, factors
        self._exchange_s = exchange_s
        self._pace = np.ones(plan.num_ranks) if pace is None else pace
        self._teach_s, self._is_local = plan.teach_s, plan.is_local
        self._training = [
            (index, placement.world_ranks.start, placement.world_ranks.stop, seconds * sizes)
            for index, (placement, seconds) in enumerate(
                zip(plan.placements, plan.image_s, strict=True)
            )
            for sizes in [np.array([len(each) for each in placement.slices], np.float64)]
        ]
        listener = BalanceListener(lambda _: None, lambda _: None)
        self._shares = MeasuredShares(self._plan_schedule, lookahead, every, listener)
        self._every = every if plan.is_dithered else 0
        self._clocks, self._last_step = _Clocks(plan), -1
        self._last = self._clocks.read()
        self._handed_in: tuple[int, list[list[float]]] | None = None
        self.clock_s = np.zeros(plan.num_ranks)
        self.marks: list[Seconds] = []
        self._factor = self._pace

    @property
    def plan(self) -> Plan:
        """The plan in force at the end."""
        return self._plan_schedule.at(np.iinfo(np.int64).max)

    def meet(self) -> None:
        """All ranks wait for the last."""
        self.clock_s = np.full_like(self.clock_s, self.clock_s.max())

    def run(self, start_step: int, num_steps: int, read_after: Collection[int] = ()) -> StepTimes:
        """The steps from ``start_step`` to before ``num_steps``, which ends the phase: look-ahead is filled and used up.

        After ``read_after`` of them ``marks`` gets the clocks of all ranks.
        """
        on_the_way: deque[Seconds] = deque()
        rows = np.empty((num_steps - start_step, len(COLUMNS)))
        for step in range(start_step, num_steps):
            work_s = 0.0
            num_ahead = min(self._lookahead + 1, num_steps - step)
            for ahead in range(len(on_the_way), num_ahead):
                work_s += self._teach(step + ahead)
                on_the_way.append(self.clock_s.copy())
            exchange_wait_s, spread_s = self._exchange(on_the_way.popleft())
            train_s, group_wait_s = self._train()
            self._after_step(step + 1)
            if step - start_step + 1 in read_after:
                self.marks.append(self.clock_s.copy())
            times = (self.clock_s.max(), work_s + train_s, exchange_wait_s, group_wait_s, spread_s)
            rows[step - start_step] = times
        return StepTimes(len(self.clock_s), *rows.T)

    def _teach(self, step: int) -> float:
        self._factor = self._factors() * self._pace
        images = np.diff(self._plan_schedule.at(step).share_borders(step))
        seconds = images * self._teach_s * self._factor
        self.clock_s += seconds
        self._clocks.count(images, seconds)
        return float(seconds.sum())

    def _exchange(self, posted_s: Seconds) -> tuple[float, float]:
        """Every rank waits for the last post; seconds waited, and from the first post to the last."""
        last_s = posted_s.max()
        spread_s = float(last_s - posted_s.min())
        if self._is_local:
            return 0.0, spread_s
        arrived = np.maximum(self.clock_s, last_s + self._exchange_s)
        waited_s = float((arrived - self.clock_s).sum())
        self.clock_s = arrived
        return waited_s, spread_s

    def _train(self) -> tuple[float, float]:
        """The networks in the recipe's order, each group meets; seconds of training, and waited for groups."""
        trained_s = waited_s = 0.0
        for index, first, end, planned_s in self._training:
            seconds = planned_s * self._factor[first:end]
            self._clocks.train_s[index, first:end] += seconds
            done = self.clock_s[first:end] + seconds
            met_s = done.max()
            self.clock_s[first:end] = met_s
            trained_s += float(seconds.sum())
            waited_s += float(met_s * (end - first) - done.sum())
        return trained_s, waited_s

    def _after_step(self, step: int) -> None:
        """Live balance, at the steps at which ``Balancer.after_step`` hands in and reads."""
        if not self._every:
            return
        if self._last_step < 0:
            self._last_step, self._last = step, self._clocks.read()
        self._balance(step)
        if step - self._last_step < self._every or self._handed_in is not None:
            return
        self._handed_in = (step, self._clocks.since(self._last, step - self._last_step))
        self._last_step, self._last = step, self._clocks.read()
        self._balance(step)

    def _balance(self, step: int) -> None:
        if self._handed_in is not None and step >= self._handed_in[0] + self._lookahead:
            (started_at, everyone), self._handed_in = self._handed_in, None
            self._shares.follow(step, started_at, everyone)
