"""Recipe and number of ranks in, plan out: who trains where, who teaches how much. Pure: no process group, no device.

Teaching is divisible to one image and is the larger part of the work, so it fills the gaps that
students leave (water filling): rank r teaches ``n_r`` images so that ``n_r * teacher cost + its
students' cost`` is the same for all r. Such shares are rarely whole. With look-ahead, ranks need to
agree on average only, so each step rounds them differently: the borders between shares are shifted
by a number u in [0, 1) that changes every step, and over the steps every rank teaches its exact
share. Without look-ahead every step ends together, so one rounding is kept, the one whose largest
load is smallest.

Shares and slices are contiguous ranges of positions in the global batch, in rank order; together
they say exactly which image goes where.

A network that finishes before the others leaves the plan from that step on: it needs nothing any
more, and the time of its ranks goes into teaching.
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise, permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import PlanError
from teacher.trainee import KOLEO_GROUP

SEARCH_LIMIT = 20_000  # placements tried one by one; beyond it the heaviest goes first
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0  # its multiples modulo one spread evenly from the start
LEAST_SHARE = 0.05  # images per step of a rank that has taught before
SHARDED_NOTE = "the teacher is sharded over all ranks (ZeRO-3), so shares are even"
NEARLY = 0.01  # placements whose steps differ by less are as good as each other
GROWTH = (
    1.2  # times the ranks of the heaviest network, from one overlapping placement tried to the next
)
KEPT_PLANS = 3  # that steps in preparation may still refer to
SLACK = 1e-9  # floating-point room when a load is compared with the level


@dataclass(frozen=True)
class Work:
    """One trained network before it is placed: seconds per image, and how many ranks it asks for (None: any)."""

    name: str
    image_s: float
    ranks: int | None = None


@dataclass(frozen=True)
class Placement:
    """Where one network trains: contiguous ranks, each with its slice of the global batch."""

    name: str
    first_rank: int
    slices: tuple[range, ...]

    @property
    def world_ranks(self) -> range:
        """The world ranks that train this network."""
        return range(self.first_rank, self.first_rank + len(self.slices))

    def slice_of(self, world_rank: int) -> range:
        """The positions that one of its ranks trains on."""
        return self.slices[world_rank - self.first_rank]

    def parts_of(self, world_rank: int, micro_batch: int | None) -> tuple[slice, ...]:
        """A rank's slice cut into as many micro-batches as the largest slice needs, by numbers within the slice.

        Whole KoLeo groups where the slice is.
        """
        own = self.slice_of(world_rank)
        count = 1 if micro_batch is None else -(-self.largest_slice // micro_batch)
        unit = KOLEO_GROUP if own.start % KOLEO_GROUP == 0 == len(own) % KOLEO_GROUP else 1
        borders = [unit * (len(own) // unit * part // count) for part in range(count + 1)]
        return tuple(slice(start, stop) for start, stop in pairwise(borders))

    @cached_property
    def largest_slice(self) -> int:
        """Images of the rank that trains on most."""
        return max(map(len, self.slices))

    @property
    def koleo_is_local(self) -> bool:
        """No KoLeo group is cut by a slice border."""
        return all(part.start % KOLEO_GROUP == 0 for part in self.slices)


@dataclass(frozen=True)
class Plan:
    """The division of every step's work over the ranks.

    ``exact_shares`` are images per rank and step before rounding; ``unit`` images are taught at
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

    def needs(self, world_rank: int) -> tuple[range, ...]:
        """Positions a rank receives: the union of its students' slices, merged and ascending."""
        return self._needs[world_rank]

    @cached_property
    def needed(self) -> NDArray[np.int64]:
        """(rank, start, stop) of every part of all ranks' needs, [3, parts]: a step's splits are array arithmetic."""
        listed = [(r, p.start, p.stop) for r, parts in enumerate(self._needs) for p in parts]
        return np.array(listed, np.int64).reshape(-1, 3).T

    @cached_property
    def _needs(self) -> tuple[tuple[range, ...], ...]:
        hosted: list[list[range]] = [[] for _ in range(self.num_ranks)]
        for placement in self.placements:
            for rank, part in zip(placement.world_ranks, placement.slices, strict=True):
                hosted[rank].append(part)
        return tuple(_merge(parts) for parts in hosted)

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
        # the slack keeps a border that is whole but for rounding from falling below itself
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
            needs == ((share,) if len(share) else ())
            for needs, share in zip(self._needs, self.shares(0), strict=True)
        )

    @property
    def load_s(self) -> tuple[float, ...]:
        """Seconds of work of each rank and step, on average over steps."""
        return tuple(
            own + self.teach_s * share
            for own, share in zip(self.student_s, self.mean_shares, strict=True)
        )

    @property
    def even_load_s(self) -> tuple[float, ...]:
        """The same with the teaching divided evenly, whole images or not."""
        each = self.teach_s * self.images_global / self.num_ranks
        return tuple(own + each for own in self.student_s)

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
            "shares": run_lengths([round(share, 4) for share in self.mean_shares]),
            "utilisation": self.utilisation,
            "utilisation_even_barrier": self.utilisation_even_barrier,
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


def make_plan(
    works: Sequence[Work],
    teach_s: float,
    images_global: int,
    num_ranks: int,
    *,
    lookahead: int = 0,
    unit: int = 1,
    has_even_shares: bool = False,
    is_teacher_sharded: bool = False,
    has_whole_groups: bool = False,
    ranks_per_node: int = 8,
) -> Plan:
    """Places networks on ranks and divides the teaching.

    Args:
        works: networks to train.
        teach_s: seconds the teacher takes per image.
        images_global: images per step.
        num_ranks: ranks of the job.
        lookahead: steps that teaching may run ahead; above 0 shares may differ from step to step.
        unit: images the teacher takes at once; shares are whole units where they divide the batch.
        has_even_shares: divide the teaching evenly, as published.
        has_whole_groups: slices are whole KoLeo groups wherever there are enough.
        is_teacher_sharded: every rank holds a part of the teacher, so shares are even.
        ranks_per_node: groups are laid out so that few of them cross a node border.

    Raises:
        PlanError: no ranks, fewer images than ranks of a network, or a network that asks for more
        ranks than there are.
    """
    if num_ranks < 1:
        raise PlanError(f"{num_ranks} ranks: at least one is needed", fix="Pass --gpus 1 or more.")
    counts, firsts, notes = _arrange(
        works,
        teach_s,
        images_global,
        num_ranks,
        ranks_per_node,
        is_filled=not (has_even_shares or is_teacher_sharded),
        may_overlap=not has_even_shares,
    )
    for work, count in zip(works, counts, strict=True):
        if count > images_global:
            raise PlanError(
                f"{work.name}: {count} ranks for a batch of {images_global} images leaves ranks without an image",
                fix=f"Use at most {images_global} ranks, or a larger schedule.batch.",
            )
    placements = tuple(
        Placement(work.name, first, split_evenly(images_global, count, in_groups=has_whole_groups))
        for work, first, count in zip(works, firsts, counts, strict=True)
    )
    image_s = tuple(work.image_s for work in works)
    student_s = _student_seconds(placements, image_s, num_ranks)
    unit = unit if images_global % unit == 0 else 1
    is_local = all(len(p.slices) == num_ranks for p in placements)  # nothing to fill or to send
    has_even_shares |= is_teacher_sharded
    is_filled = not is_local and not has_even_shares
    is_dithered = is_filled and lookahead > 0
    if is_local:
        exact, unit = [float(len(part)) for part in placements[0].slices], 1
    elif has_even_shares:
        exact, unit = [float(len(part)) for part in split_evenly(images_global, num_ranks)], 1
    else:
        exact = _fill(student_s, teach_s, images_global, unit, is_dithered=is_dithered)
    return Plan(
        images_global=images_global,
        num_ranks=num_ranks,
        placements=placements,
        exact_shares=tuple(exact),
        unit=unit,
        is_filled=is_filled,
        is_dithered=is_dithered,
        is_teacher_sharded=is_teacher_sharded,
        teach_s=teach_s,
        image_s=image_s,
        student_s=student_s,
        notes=(*notes, SHARDED_NOTE) if is_teacher_sharded else notes,
    )


def without(plan: Plan, names: Collection[str]) -> Plan:
    """The plan once some networks are finished; placements of the others stay."""
    kept = [
        (placement, image_s)
        for placement, image_s in zip(plan.placements, plan.image_s, strict=True)
        if placement.name not in names
    ]
    placements, image_s = (tuple(column) for column in zip(*kept, strict=True))
    student_s = _student_seconds(placements, image_s, plan.num_ranks)
    changed = replace(plan, placements=placements, image_s=image_s, student_s=student_s)
    if not plan.is_filled:
        return changed
    dithered = plan.is_dithered
    shares = _fill(student_s, plan.teach_s, plan.images_global, plan.unit, is_dithered=dithered)
    return replace(changed, exact_shares=tuple(shares))


def _student_seconds(
    placements: Sequence[Placement], image_s: Sequence[float], num_ranks: int
) -> tuple[float, ...]:
    """Seconds of all networks on each rank per step."""
    student_s = [0.0] * num_ranks
    for placement, each in zip(placements, image_s, strict=True):
        for rank, part in zip(placement.world_ranks, placement.slices, strict=True):
            student_s[rank] += each * len(part)
    return tuple(student_s)


def _fill(
    student_s: Sequence[float], teach_s: float, images_global: int, unit: int, *, is_dithered: bool
) -> list[float]:
    """Shares that fill the gaps: exact ones where steps may differ, whole ones where they may not."""
    if is_dithered:
        return fill_exactly(student_s, [teach_s] * len(student_s), images_global)
    return [float(size) for size in fill_whole(student_s, teach_s, images_global, unit)]


def _merge(parts: Sequence[range]) -> tuple[range, ...]:
    merged: list[range] = []
    for part in sorted((p for p in parts if len(p)), key=lambda p: p.start):
        if merged and part.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, part.stop))
        else:
            merged.append(part)
    return tuple(merged)


def _arrange(
    works: Sequence[Work],
    teach_s: float,
    images_global: int,
    num_ranks: int,
    ranks_per_node: int,
    *,
    is_filled: bool,
    may_overlap: bool,
) -> tuple[Sequence[int], Sequence[int], tuple[str, ...]]:
    """Number of ranks and first rank of each network, and notes.

    Side by side where that keeps all ranks busy. Where one network is too heavy for the ranks it
    would get, groups may overlap: it trains on more ranks, which hold others too.
    """
    counts, notes = _count_ranks(works, num_ranks)
    firsts = _first_ranks(works, counts, num_ranks, ranks_per_node)
    total_s = images_global * (teach_s + sum(work.image_s for work in works))
    ideal_s = total_s / num_ranks

    def step_s(counts: Sequence[int], firsts: Sequence[int]) -> float:
        student_s = np.zeros(num_ranks)
        for work, count, first in zip(works, counts, firsts, strict=True):
            student_s[first : first + count] += work.image_s * images_global / count
        even = teach_s * images_global / num_ranks
        return float(max(student_s.max(), ideal_s) if is_filled else student_s.max() + even)

    if not may_overlap or step_s(counts, firsts) <= ideal_s * (1.0 + NEARLY):
        return counts, firsts, notes
    candidates = _overlapping(works, num_ranks, images_global)
    found = min(candidates, key=lambda c: (round(step_s(*c) / ideal_s, 2), sum(c[0]), step_s(*c)))
    if step_s(*found) > step_s(counts, firsts) * (1.0 - NEARLY):
        return counts, firsts, notes
    return *found, (f"{len(works)} networks on {num_ranks} ranks: some ranks hold several",)


def _overlapping(
    works: Sequence[Work], num_ranks: int, images_global: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Counts and first ranks of groups that may overlap: all there are, or the heaviest spread step by step."""
    most = min(num_ranks, images_global)
    allowed = [range(1, most + 1) if w.ranks is None else (w.ranks,) for w in works]
    spans = [[(n, first) for n in each for first in range(num_ranks - n + 1)] for each in allowed]
    if math.prod(len(each) for each in spans) <= SEARCH_LIMIT:
        for chosen in product(*spans):
            yield tuple(zip(*chosen, strict=True))  # type: ignore[misc]  # two rows
        return
    counts = [each[0] for each in allowed]
    while True:
        load = [work.image_s / count for work, count in zip(works, counts, strict=True)]
        yield tuple(counts), tuple(_heaviest_first(load, counts, num_ranks))
        growing = [i for i, each in enumerate(allowed) if counts[i] < each[-1]]
        if not growing:
            return
        heaviest = max(growing, key=lambda index: load[index])
        grown = max(counts[heaviest] + 1, math.ceil(counts[heaviest] * GROWTH))
        counts[heaviest] = min(grown, allowed[heaviest][-1])


def _count_ranks(works: Sequence[Work], num_ranks: int) -> tuple[list[int], tuple[str, ...]]:
    """Ranks of each network: as asked, the others by giving each next rank to whoever has most work per rank.

    That order makes the heaviest rank as light as any division of the ranks can (each rank goes where
    the maximum is), and the teaching fills what remains below it.
    """
    for work in works:
        if work.ranks is not None and work.ranks > num_ranks:
            raise PlanError(
                f"students.{work.name}.ranks = {work.ranks}: this job has {num_ranks} ranks",
                fix=f"Ask for at most {num_ranks}, write `ranks: auto`, or start more processes.",
            )
    counts = [work.ranks or 1 for work in works]
    free = num_ranks - sum(counts)
    if free < 0:
        return counts, (f"{len(works)} networks on {num_ranks} ranks: some ranks hold several",)
    flexible = [index for index, work in enumerate(works) if work.ranks is None]
    for _ in range(free if flexible else 0):
        heaviest = max(flexible, key=lambda index: works[index].image_s / counts[index])
        counts[heaviest] += 1
    idle = num_ranks - sum(counts)
    return counts, ((f"{idle} ranks only teach",) if idle else ())


def _first_ranks(
    works: Sequence[Work], counts: Sequence[int], num_ranks: int, ranks_per_node: int
) -> list[int]:
    """Side by side where they fit, otherwise stacked so that the fullest rank is as light as can be."""
    if sum(counts) <= num_ranks:
        return _side_by_side(counts, ranks_per_node)
    return _stacked([w.image_s / c for w, c in zip(works, counts, strict=True)], counts, num_ranks)


def _side_by_side(counts: Sequence[int], ranks_per_node: int) -> list[int]:
    """First ranks of contiguous groups, in an order with few groups across node borders.

    The recipe's order unless another is better: of all orders for up to six groups; beyond, the one
    that puts whole nodes first and then fills each node with what fits it best.
    """

    def crossings(order: Sequence[int]) -> int:
        ends = list(accumulate(counts[index] for index in order))
        starts = [0, *ends[:-1]]
        return sum(
            (end - 1) // ranks_per_node - start // ranks_per_node
            for start, end in zip(starts, ends, strict=True)
        )

    given = tuple(range(len(counts)))
    orders = permutations(given) if len(counts) <= 6 else (given, _packed(counts, ranks_per_node))
    order = min(orders, key=crossings)
    firsts = [0] * len(counts)
    for index, first in zip(order, accumulate([0, *(counts[i] for i in order)]), strict=False):
        firsts[index] = first
    return firsts


def _packed(counts: Sequence[int], ranks_per_node: int) -> tuple[int, ...]:
    """Groups of whole nodes, then the others, each time the largest remainder that fits the open node."""
    order = [index for index, count in enumerate(counts) if count % ranks_per_node == 0]
    left = [index for index, count in enumerate(counts) if count % ranks_per_node]
    filled = 0
    while left:
        room = ranks_per_node - filled % ranks_per_node
        fitting = [index for index in left if counts[index] % ranks_per_node <= room]
        chosen = max(fitting or left, key=lambda index: counts[index] % ranks_per_node)
        order.append(chosen)
        left.remove(chosen)
        filled += counts[chosen]
    return tuple(order)


def _stacked(load: Sequence[float], counts: Sequence[int], num_ranks: int) -> list[int]:
    """First ranks when there are fewer ranks than networks want: the best of all placements, or heaviest first."""
    choices = [range(num_ranks - count + 1) for count in counts]

    def fullest(firsts: Iterable[int]) -> tuple[float, ...]:
        total = [0.0] * num_ranks
        for first, count, each in zip(firsts, counts, load, strict=True):
            for rank in range(first, first + count):
                total[rank] += each
        return tuple(sorted(total, reverse=True))

    if math.prod(len(choice) for choice in choices) <= SEARCH_LIMIT:
        return list(min(product(*choices), key=fullest))
    return _heaviest_first(load, counts, num_ranks)


def _heaviest_first(load: Sequence[float], counts: Sequence[int], num_ranks: int) -> list[int]:
    """First ranks, each network in turn where the fullest of its ranks is emptiest."""
    firsts = [0] * len(counts)
    total = [0.0] * num_ranks
    for index in sorted(range(len(counts)), key=lambda i: -load[i]):
        count = counts[index]
        starts = range(num_ranks - count + 1)
        firsts[index] = min(starts, key=lambda first: max(total[first : first + count]))
        for rank in range(firsts[index], firsts[index] + count):
            total[rank] += load[index]
    return firsts


def split_evenly(
    images_global: int, num_parts: int, *, in_groups: bool = False
) -> tuple[range, ...]:
    """Contiguous ranges whose sizes differ by at most one, or by none in whole KoLeo groups where those divide.

    ``in_groups``: whole KoLeo groups wherever there are enough, so that sizes may differ by one group.
    """
    groups, rest = divmod(images_global, KOLEO_GROUP)
    is_whole = rest == 0 and (groups % num_parts == 0 or (in_groups and groups >= num_parts))
    unit = KOLEO_GROUP if is_whole else 1
    units = images_global // unit
    borders = [unit * (units * part // num_parts) for part in range(num_parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(borders))


def fill_exactly(
    student_s: Sequence[float], teach_s: Sequence[float], images_global: int
) -> list[float]:
    """Shares that make the total load of all ranks equal (water filling), not rounded.

    ``teach_s`` is each rank's own time per image: a slow rank teaches less. Ranks whose students
    already exceed the level teach nothing.
    """
    order = sorted(range(len(student_s)), key=lambda rank: student_s[rank])
    level = speed = offset = 0.0
    for count, rank in enumerate(order, start=1):
        speed += 1.0 / teach_s[rank]
        offset += student_s[rank] / teach_s[rank]
        level = (images_global + offset) / speed
        if count == len(order) or level <= student_s[order[count]]:
            break
    return [max(0.0, level - own) / each for own, each in zip(student_s, teach_s, strict=True)]


def rebalanced(plan: Plan, teach_s: Sequence[float], student_s: Sequence[float]) -> Plan:
    """The plan with shares for measured seconds: per image taught, and per step of the students, of each rank.

    Placements stay. For plans whose shares are dithered; others come back as they are.
    """
    if not plan.is_dithered:
        return plan
    exact = fill_exactly(student_s, teach_s, plan.images_global)
    # a rank that teaches goes on to, however little: its decoder waits for a step with an image
    least = [LEAST_SHARE if before else 0.0 for before in plan.exact_shares]
    kept = [max(share, floor) for share, floor in zip(exact, least, strict=True)]
    whole = plan.images_global / sum(kept)
    return replace(
        plan, exact_shares=tuple(share * whole for share in kept), student_s=tuple(student_s)
    )


class Timetable:
    """The plan in force at each step. It changes only at steps that all ranks agree on, and only ahead of them.

    ``later`` are changes known from the start, ascending: networks that finish early.
    """

    def __init__(self, plan: Plan, later: Sequence[tuple[int, Plan]] = ()) -> None:
        self._entries = [(0, plan), *later]

    def at(self, step: int) -> Plan:
        """The plan of a step."""
        return next(plan for start, plan in reversed(self._entries) if start <= step)

    def change(self, from_step: int, plan: Plan) -> None:
        """Puts another plan in force from a step on that nobody has begun to prepare, until the next known change."""
        before = [entry for entry in self._entries if entry[0] <= from_step]
        assert before[-1][0] < from_step, "one plan per step"
        later = self._entries[len(before) :]
        self._entries = [*before[-KEPT_PLANS:], (from_step, plan), *later]

    def has_same_networks(self, from_step: int, to_step: int) -> bool:
        """No network finishes between two steps."""
        return self.at(from_step).placements == self.at(to_step).placements

    def most_images(self, world_rank: int) -> int:
        """The most images a rank ever teaches in one step of the plans known now."""
        return max(plan.largest_shares[world_rank] for _, plan in self._entries)


def fill_whole(
    student_s: Sequence[float], teach_s: float, images_global: int, unit: int
) -> list[int]:
    """Shares in whole units with the smallest largest load that whole units allow.

    The level is found among the loads that some rank would reach with some share; then one unit is
    taken from the fullest rank until the batch is divided.
    """
    own, cost = np.asarray(student_s), teach_s * unit
    units = images_global // unit
    exact = np.asarray(fill_exactly(student_s, [teach_s] * len(student_s), images_global)) / unit
    low = np.floor(exact)
    # at the level of the exact filling at most `units` fit; one more unit on every rank is enough
    candidates = sorted({*(own + cost * low), *(own + cost * (low + 1))})

    def fitting(level: float) -> NDArray[np.float64]:
        room: NDArray[np.float64] = np.floor((level - own) / cost + SLACK).clip(min=0.0)
        return room

    index = bisect_left(candidates, True, key=lambda level: bool(fitting(level).sum() >= units))
    sizes = fitting(candidates[index])
    surplus = int(sizes.sum()) - units
    load = np.where(sizes > 0, own + cost * sizes, -np.inf)
    for _ in range(surplus):
        fullest = int(load.argmax())
        sizes[fullest] -= 1
        load[fullest] = load[fullest] - cost if sizes[fullest] > 0 else -np.inf
    return [int(size) * unit for size in sizes]
