"""Teacher shares that follow the measured speed of every rank.

Every ``every`` steps all ranks exchange how long they took to teach an image and to train a step of each
network (on a GPU without waiting for their groups; a delayed_reduce: some numbers each, without a barrier). Each computes the same new shares from the same
numbers, and they come into force at a later step that no rank has begun to prepare. A slow rank teaches less; the
others teach more. Targets do not depend on the rank that computes them, so results stay the same bit for
bit. The first measurement is handed on: it is what the networks cost, by which the next start places them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Protocol, runtime_checkable

import torch.distributed as dist

from distill.data.loader import STEPS_AHEAD
from distill.engine.delayed_reduce import DelayedAllReduce, gather_rows
from distill.plan.costs import Costs
from distill.plan.plan import Plan, rebalanced
from distill.train.by_step import PlanSchedule
from distill.train.student import Stopwatch

SLOW = 1.15  # times the median time per image: a rank is called slow
RECOVERED = 1.05  # times the median: it no longer is
MARGIN = 2  # steps, beside look-ahead and what the decoder has in hand
MEASURED_HERE = "measured in this run"
WORTH = 0.02  # shares are left alone when the step would become shorter by less


@runtime_checkable
class _Room(Protocol):
    def make_room(self, max_images: int) -> None: ...


@dataclass(frozen=True)
class BalanceListener:
    """Who hears of what was measured, on every rank alike: a line per event, and what the networks cost, once."""

    event: Callable[[str], None]
    costs: Callable[[Costs], None]


class MeasuredShares:
    """New shares from the seconds of every rank; the same on every rank, without communication. A simulation follows the same ones."""

    def __init__(
        self, plan_schedule: PlanSchedule, lookahead: int, every: int, listener: BalanceListener
    ) -> None:
        self._plan_schedule, self._every, self._listener = plan_schedule, every, listener
        self._names = [placement.name for placement in plan_schedule.at(0).placements]
        self._delay = lookahead + STEPS_AHEAD + MARGIN
        self._is_measured = False
        self._known_slow: set[int] = set()
        self._known_s: dict[int, float] = {}

    def follow(
        self, step: int, started_at: int, everyone: Sequence[Sequence[float]]
    ) -> Plan | None:
        """The plan that is put in force at a later step; None where shares stay.

        Args:
            step: finished steps of the phase.
            started_at: the step at which the seconds were handed in.
            everyone: of every rank, seconds per teacher image and of each network per step.
        """
        from_step, first_measured = step + self._delay, started_at - self._every
        if not self._plan_schedule.has_same_networks(first_measured, from_step):
            return None  # a network finishes: what was measured does not hold for what comes
        plan = self._plan_schedule.at(step)
        measured = [rank[0] for rank in everyone]
        student_s = [sum(rank[1:]) for rank in everyone]
        # of two ranks the faster is the usual one: between them, neither would stand out
        typical = median_low(seconds for seconds in measured if seconds > 0)
        # a rank that computed no targets this time is as fast as it was
        each = [now or self._known_s.get(r, typical) for r, now in enumerate(measured)]
        self._known_s = dict(enumerate(each))
        self._report(started_at, each, typical)
        self._hand_on(plan, each, everyone)
        changed = rebalanced(plan, each, student_s)
        before, after = (
            max(
                local_s + share * image_s
                for local_s, share, image_s in zip(
                    changed.student_s, which.exact_shares, each, strict=True
                )
            )
            for which in (plan, changed)
        )
        if after > before * (1.0 - WORTH):
            return None
        self._plan_schedule.change(from_step, changed)
        return changed

    def _hand_on(
        self, plan: Plan, each: Sequence[float], everyone: Sequence[Sequence[float]]
    ) -> None:
        """The seconds per image of the teacher and of every network, once: the first time that all of them were measured."""
        images = plan.images_global
        network_s = [
            sum(rank) / images for rank in zip(*(row[1:] for row in everyone), strict=True)
        ]
        if self._is_measured or not all(network_s):
            return
        self._is_measured = True
        shares = zip(plan.exact_shares, each, strict=True)
        teach_s = sum(share * seconds for share, seconds in shares) / images
        image_s = dict(zip(self._names, network_s, strict=True))
        self._listener.costs(Costs(teach_s, image_s, MEASURED_HERE))

    def _report(self, step: int, each: Sequence[float], typical: float) -> None:
        """Names a rank once when it becomes slow."""
        slow = {rank for rank, seconds in enumerate(each) if seconds > SLOW * typical}
        recovered = {rank for rank, seconds in enumerate(each) if seconds < RECOVERED * typical}
        for rank in sorted(slow - self._known_slow):
            self._listener.event(
                f"step {step}: rank {rank} takes {each[rank] / typical:.2f}x the usual time per image; it will teach less"
            )
        self._known_slow = (self._known_slow | slow) - recovered


class Balancer:
    """Re-plans the shares of one phase; the same calls on every rank."""

    def __init__(
        self,
        plan_schedule: PlanSchedule,
        group: dist.ProcessGroup,
        loader: _Room,
        clocks: tuple[Stopwatch, Mapping[str, Stopwatch]],
        *,
        lookahead: int,
        every: int,
        listener: BalanceListener,
    ) -> None:
        """``group``: of the world, for CPU tensors. ``clocks``: of teaching, and of each student on this rank by its name."""
        self._rank = dist.get_rank(group)
        self._num_ranks = dist.get_world_size(group)
        self._delayed_reduce = DelayedAllReduce(group, lookahead)
        self._loader, self._teaching, self._training = loader, *clocks
        self._names = [placement.name for placement in plan_schedule.at(0).placements]
        self._every = every
        self._shares = MeasuredShares(plan_schedule, lookahead, every, listener)
        self._last_step = -1
        self._last: Sequence[float] = ()

    def after_step(self, step: int) -> None:
        """Counts a finished step of the phase; at the interval, measures, and re-plans once all seconds have arrived.

        Communication: one delayed_reduce over the world per interval.
        """
        if self._last_step < 0:  # the first step loads libraries and finds algorithms: not counted
            self._last_step, self._last = step, self._read()
        if self._delayed_reduce.is_due(step):
            self._replan(step)
        if step - self._last_step < self._every or self._delayed_reduce.due_step is not None:
            return
        now = self._read()
        images, teach_s, *train_s = (
            after - before for after, before in zip(now, self._last, strict=True)
        )
        steps = step - self._last_step
        local = (teach_s / images if images else 0.0, *(each / steps for each in train_s))
        self._last_step, self._last = step, now
        self._delayed_reduce.start(
            step, gather_rows(local, self._rank, self._num_ranks), dist.ReduceOp.SUM
        )
        if self._delayed_reduce.is_due(step):
            self._replan(step)

    def _read(self) -> Sequence[float]:
        """Teacher images, seconds of teaching, seconds of training of each network of the job, all so far."""
        clocks = [self._training.get(name) for name in self._names]
        training_s = [0.0 if clock is None else clock.read_s() for clock in clocks]
        teaching_s = self._teaching.read_s()  # first: on a GPU units follow seconds
        return float(self._teaching.units), teaching_s, *training_s

    def _replan(self, step: int) -> None:
        """Puts the shares in force that follow from what every rank has handed in."""
        started_at = self._delayed_reduce.started_at
        changed = self._shares.follow(step, started_at, self._delayed_reduce.result().tolist())
        if changed is not None:
            self._loader.make_room(changed.largest_shares[self._rank])
