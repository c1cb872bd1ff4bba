"""Recipe and number of ranks in, plan out: who trains where, who teaches how much. Pure: no process group, no device.

Teaching is divisible to one image and is the larger part of the work, so it fills the gaps that
students leave (water filling): rank r teaches ``n_r`` images so that ``n_r * teacher cost + its
students' cost`` is the same for all r. Such shares are rarely integers. With look-ahead, ranks need to
agree on average only, so each step rounds them differently: the borders between shares are shifted
by a number u in [0, 1) that changes every step, and over the steps every rank teaches its exact
share. A group meets after every step, though, and waits for those of its ranks that teach one image
more; where full units make its step shorter than that, shares are such units, the same in every step. Without
look-ahead every step ends together, so one rounding is kept, the one whose largest load is smallest.

Shares and slices are contiguous ranges of positions in the global batch, in rank order; together
they say exactly which image goes where.

A network that finishes before the others leaves the plan from that step on: it needs nothing any
more, and the time of its ranks goes into teaching.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import PlanError
from distill.plan.placement import GlobalBatch, NetworkCost, place_networks
from distill.plan.shares import SLACK, fill_shares, merge_ranges, refill_shares, split_evenly
from distill.plan.slices import Placement

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0  # its multiples modulo one spread evenly from the start
RANKS_PER_NODE = 8  # where neither recipe nor launcher say: GPUs of the usual server
SHARDED_NOTE = "the teacher is sharded over all ranks (ZeRO-3), so shares are even"


@dataclass(frozen=True)
class Plan:
    """The division of every step's work over the ranks.

    ``exact_shares`` are images per rank and step before rounding; ``unit`` images are computed at
    once; ``is_filled``: teaching fills the gaps that students leave. Seconds: ``teach_s`` of the teacher per image, ``image_s`` of each network per image,
    ``student_s`` of all networks on a rank per step.
    """

    images_global: int
    num_ranks: int
    placements: tuple[Placement, ...]
    exact_shares: tuple[float, ...]
    unit: int
    is_filled: bool
    is_dithered: bool
    is_teacher_sharded: bool
    teach_s: float
    image_s: tuple[float, ...]
    student_s: tuple[float, ...]
    notes: tuple[str, ...]

    @cached_property
    def needed(self) -> NDArray[np.int64]:
        """(rank, start, stop) of every part of all ranks' needs, [3, parts]: a step's splits are array arithmetic."""
        listed = [
            (r, p.start, p.stop) for r, parts in enumerate(self.required_positions) for p in parts
        ]
        return np.array(listed, np.int64).reshape(-1, 3).T

    @cached_property
    def required_positions(self) -> tuple[tuple[range, ...], ...]:
        """Positions each rank receives: the union of its students' slices, merged and ascending."""
        hosted: list[list[range]] = [[] for _ in range(self.num_ranks)]
        for placement in self.placements:
            for rank, part in zip(placement.world_ranks, placement.slices, strict=True):
                hosted[rank].append(part)
        return tuple(merge_ranges(parts) for parts in hosted)

    @cached_property
    def _borders(self) -> NDArray[np.float64]:
        """Where shares end, in units, before rounding; the last is exact."""
        ends = np.cumsum(np.asarray(self.exact_shares)) / self.unit
        ends[-1] = self.images_global / self.unit
        return np.concatenate([[0.0], ends])

    def shares(self, step: int) -> tuple[range, ...]:
        """The positions each rank teaches at ``step``; rank by rank they cover the batch once."""
        borders = self.share_borders(step).tolist()
        return tuple(range(start, stop) for start, stop in pairwise(borders))

    def share(self, world_rank: int, step: int) -> range:
        """The positions one rank teaches at ``step``."""
        start, stop = self.share_borders(step)[world_rank : world_rank + 2].tolist()
        return range(start, stop)

    def share_borders(self, step: int) -> NDArray[np.int64]:
        """Starts of all shares at ``step`` and the end of the last, [num_ranks + 1]."""
        shift = (step * GOLDEN) % 1.0 if self.is_dithered else 0.0
        # the slack keeps a border that is an integer but for rounding from falling below itself
        return self.unit * np.floor(self._borders + shift + SLACK).astype(np.int64)

    @property
    def largest_shares(self) -> tuple[int, ...]:
        """The most images each rank ever teaches in one step."""
        if not self.is_dithered:
            return tuple(len(share) for share in self.shares(0))
        units = [
            math.ceil(share / self.unit + SLACK) if share else 0 for share in self.exact_shares
        ]
        return tuple(min(count * self.unit, self.images_global) for count in units)

    @cached_property
    def is_local(self) -> bool:
        """Every rank teaches exactly what it trains on: nothing has to travel."""
        if self.is_dithered:
            return False
        return all(
            required_positions == ((share,) if len(share) else ())
            for required_positions, share in zip(
                self.required_positions, self.shares(0), strict=True
            )
        )

    @property
    def load_s(self) -> tuple[float, ...]:
        """Seconds of work of each rank and step, on average over steps."""
        return tuple(
            local + self.teach_s * share
            for local, share in zip(self.student_s, self.mean_shares, strict=True)
        )

    @property
    def even_load_s(self) -> tuple[float, ...]:
        """The same with the teaching divided evenly, in fractions of images if need be."""
        each = self.teach_s * self.images_global / self.num_ranks
        return tuple(local + each for local in self.student_s)

    @property
    def step_s(self) -> float:
        """Seconds of a step: the largest load."""
        return max(self.load_s)

    @property
    def utilisation(self) -> float:
        """Mean load over the largest: the bound on how busy the ranks can be."""
        return sum(self.load_s) / (self.num_ranks * self.step_s)

    @property
    def utilisation_even_barrier(self) -> float:
        """The same bound with even shares and a barrier every step, as published."""
        return sum(self.even_load_s) / (self.num_ranks * max(self.even_load_s))

    @property
    def gain(self) -> float:
        """Time of one separate job per student on these ranks, all perfectly filled, over this job's."""
        separate = sum(self.teach_s + each for each in self.image_s)
        return separate * self.images_global / self.num_ranks / self.step_s

    @property
    def gain_bound(self) -> float:
        """The gain of a job without a gap: (S C_T + sum C_i) / (C_T + sum C_i)."""
        students = sum(self.image_s)
        return (len(self.image_s) * self.teach_s + students) / (self.teach_s + students)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, for ``plan.json`` and ``--json``."""
        return {
            "images_global": self.images_global,
            "num_ranks": self.num_ranks,
            "ranks": {p.name: len(p.slices) for p in self.placements},
            "placements": {
                p.name: [p.world_ranks.start, p.world_ranks.stop] for p in self.placements
            },
            "slices": {p.name: run_lengths([len(s) for s in p.slices]) for p in self.placements},
            "micro_batches": {p.name: p.num_parts for p in self.placements},
            "shares": run_lengths([round(share, 4) for share in self.mean_shares]),
            "utilisation": self.utilisation,
            "utilisation_even_barrier": self.utilisation_even_barrier,
            "teach_s": self.teach_s,
            "image_s": {p.name: s for p, s in zip(self.placements, self.image_s, strict=True)},
            "step_s": self.step_s,
            "images_per_s": self.images_global / self.step_s,
            "gain": self.gain,
            "gain_bound": self.gain_bound,
            "notes": list(self.notes),
        }

    @property
    def mean_shares(self) -> tuple[float, ...]:
        """Images each rank teaches per step, on average over steps."""
        if self.is_dithered:
            return self.exact_shares
        return tuple(float(len(share)) for share in self.shares(0))


def run_lengths(values: Sequence[float]) -> list[list[float]]:
    """Run-length code: [count, value] of each run of equal values."""
    return [[len(list(run)), value] for value, run in groupby(values)]


@dataclass(frozen=True)
class PlanOptions:
    """What a plan may and must do.

    Args:
        lookahead: steps that teaching may run ahead; above 0 shares may differ from step to step.
        unit: images the teacher takes at once; shares are multiples of it where they divide the batch.
        has_even_shares: divide the teaching evenly, as published.
        has_full_groups: slices are full KoLeo groups wherever there are enough.
        is_teacher_sharded: every rank holds a part of the teacher, so shares are even.
        ranks_per_node: groups are laid out so that few of them cross a node border.
    """

    lookahead: int = 0
    unit: int = 1
    has_even_shares: bool = False
    is_teacher_sharded: bool = False
    has_full_groups: bool = False
    ranks_per_node: int = RANKS_PER_NODE


def make_plan(
    costs: Sequence[NetworkCost],
    teach_s: float,
    images_global: int,
    num_ranks: int,
    options: PlanOptions = PlanOptions(),
) -> Plan:
    """Places networks on ranks and divides the teaching.

    Args:
        costs: of the networks to train.
        teach_s: seconds the teacher takes per image.
        images_global: images per step.
        num_ranks: ranks of the job.
        options: what the plan may and must do.

    Raises:
        PlanError: no ranks, fewer images than ranks of a network, or a network that asks for more
        ranks than there are.
    """
    placements, notes = _place(costs, teach_s, images_global, num_ranks, options)
    image_s = tuple(cost.image_s for cost in costs)
    student_s = _student_seconds(placements, image_s, num_ranks)
    unit = options.unit if images_global % options.unit == 0 else 1
    is_local = all(len(p.slices) == num_ranks for p in placements)  # nothing to fill or to send
    is_even = options.has_even_shares or options.is_teacher_sharded
    is_filled = not is_local and not is_even
    is_dithered = is_filled and options.lookahead > 0
    if is_local:
        exact, unit = [float(len(part)) for part in placements[0].slices], 1
    elif is_even:
        exact, unit = [float(len(part)) for part in split_evenly(images_global, num_ranks)], 1
    else:
        groups = [p.world_ranks for p in placements] if is_dithered else None
        exact = fill_shares(student_s, [teach_s] * num_ranks, images_global, unit, groups)
    return Plan(
        images_global=images_global,
        num_ranks=num_ranks,
        placements=placements,
        exact_shares=tuple(exact),
        unit=unit,
        is_filled=is_filled,
        is_dithered=is_dithered,
        is_teacher_sharded=options.is_teacher_sharded,
        teach_s=teach_s,
        image_s=image_s,
        student_s=student_s,
        notes=(*notes, SHARDED_NOTE) if options.is_teacher_sharded else notes,
    )


def _place(
    costs: Sequence[NetworkCost],
    teach_s: float,
    images_global: int,
    num_ranks: int,
    options: PlanOptions,
) -> tuple[tuple[Placement, ...], tuple[str, ...]]:
    """Ranks and slices of every network, and what people should know about them."""
    if num_ranks < 1:
        raise PlanError(f"{num_ranks} ranks: at least one is needed", fix="Pass --gpus 1 or more.")
    counts, firsts, notes = place_networks(
        costs,
        teach_s,
        GlobalBatch(images_global, options.has_full_groups),
        num_ranks,
        options.ranks_per_node,
        is_filled=not (options.has_even_shares or options.is_teacher_sharded),
        may_overlap=not options.has_even_shares,
    )
    for cost, count in zip(costs, counts, strict=True):
        if count > images_global:
            raise PlanError(
                f"{cost.name}: {count} ranks for a batch of {images_global} images leaves ranks without an image",
                fix=f"Use at most {images_global} ranks, or a larger schedule.batch.",
            )
    in_groups = options.has_full_groups
    placements = tuple(
        Placement(cost.name, first, split_evenly(images_global, count, in_groups=in_groups))
        for cost, first, count in zip(costs, firsts, counts, strict=True)
    )
    return placements, tuple(notes)


def without(plan: Plan, names: Collection[str]) -> Plan:
    """The plan once some networks are finished; placements of the others stay."""
    remaining = [
        (placement, image_s)
        for placement, image_s in zip(plan.placements, plan.image_s, strict=True)
        if placement.name not in names
    ]
    placements, image_s = (tuple(column) for column in zip(*remaining, strict=True))
    student_s = _student_seconds(placements, image_s, plan.num_ranks)
    changed = replace(plan, placements=placements, image_s=image_s, student_s=student_s)
    if not plan.is_filled:
        return changed
    groups = [p.world_ranks for p in placements] if plan.is_dithered else None
    teach_s = [plan.teach_s] * plan.num_ranks
    shares = fill_shares(student_s, teach_s, plan.images_global, plan.unit, groups)
    return replace(changed, exact_shares=tuple(shares))


def timed_by(plan: Plan, teach_s: float, image_s: Sequence[float]) -> Plan:
    """The plan with other seconds per image, of its teacher and of its networks; who does what stays."""
    student_s = _student_seconds(plan.placements, image_s, plan.num_ranks)
    return replace(plan, teach_s=teach_s, image_s=tuple(image_s), student_s=student_s)


def _student_seconds(
    placements: Sequence[Placement], image_s: Sequence[float], num_ranks: int
) -> tuple[float, ...]:
    """Seconds of all networks on each rank per step."""
    student_s = [0.0] * num_ranks
    for placement, each in zip(placements, image_s, strict=True):
        for rank, part in zip(placement.world_ranks, placement.slices, strict=True):
            student_s[rank] += each * len(part)
    return tuple(student_s)


def rebalanced(plan: Plan, teach_s: Sequence[float], student_s: Sequence[float]) -> Plan:
    """The plan with shares for measured seconds: per teacher image, and per step of the students, of each rank.

    Placements stay. For plans whose shares are dithered; others come back as they are.
    """
    if not plan.is_dithered:
        return plan
    groups = [placement.world_ranks for placement in plan.placements]
    shares = refill_shares(plan.exact_shares, student_s, teach_s, plan.unit, groups)
    return replace(plan, exact_shares=tuple(shares), student_s=tuple(student_s))
