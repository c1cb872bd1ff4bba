"""Which ranks train which network: contiguous groups, few of them across node borders, all ranks kept busy.

Each next rank goes to the network with most work per rank, which makes the heaviest rank as light as any
division of the ranks can; teaching fills what remains below it (``distill.plan.shares``).
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, permutations, product

import numpy as np

from distill.errors import PlanError
from distill.plan.shares import largest_part

SEARCH_LIMIT = 20_000  # placements tried one by one; beyond it the heaviest goes first
NEARLY = 0.01  # placements whose steps differ by less are as good as each other
# times the ranks of the heaviest network, from one overlapping placement tried to the next
GROWTH = 1.2


@dataclass(frozen=True)
class NetworkCost:
    """One trained network before it is placed: seconds per image, and how many ranks it asks for, or which (None: any)."""

    name: str
    image_s: float
    ranks: int | range | None = None


@dataclass(frozen=True)
class GlobalBatch:
    """What is divided over the ranks of a network: its images, in full KoLeo groups if ``in_groups``."""

    images: int
    in_groups: bool = False

    def largest(self, count: int) -> int:
        """Images of the rank with most of ``count``."""
        return largest_part(self.images, count, in_groups=self.in_groups)


def place_networks(
    costs: Sequence[NetworkCost],
    teach_s: float,
    batch: GlobalBatch,
    num_ranks: int,
    ranks_per_node: int,
    *,
    is_filled: bool,
    may_overlap: bool,
) -> tuple[Sequence[int], Sequence[int], tuple[str, ...]]:
    """Number of ranks and first rank of each network, and notes.

    Where the recipe names ranks, those. Otherwise side by side where that keeps all ranks busy;
    where one network is too heavy for the ranks it would get, groups may overlap: it trains on more
    ranks, which hold others too.

    Raises:
        PlanError: a network asks for ranks that this job has not.
    """
    given = [work.ranks for work in costs if isinstance(work.ranks, range)]
    if given:
        assert len(given) == len(costs), "ranges for all or for none, a rule of recipes"
        return _as_given(costs, given, num_ranks)
    counts, notes = _count_ranks(costs, num_ranks)
    firsts = _first_ranks(costs, counts, num_ranks, ranks_per_node)
    if max(counts) > batch.images:  # ranks without an image, which is refused
        return counts, firsts, notes
    total_s = batch.images * (teach_s + sum(work.image_s for work in costs))
    ideal_s = total_s / num_ranks

    def step_s(counts: Sequence[int], firsts: Sequence[int]) -> float:
        student_s = np.zeros(num_ranks)
        for work, count, first in zip(costs, counts, firsts, strict=True):
            student_s[first : first + count] += work.image_s * batch.largest(count)
        even = teach_s * batch.images / num_ranks
        if all(count == num_ranks for count in counts):  # each teaches what it trains on
            return float(student_s.max() + teach_s * batch.largest(num_ranks))
        return float(max(student_s.max(), ideal_s) if is_filled else student_s.max() + even)

    if step_s(counts, firsts) > ideal_s * (1.0 + NEARLY):
        others = _count_by_slices(costs, num_ranks, batch)
        other_firsts = _first_ranks(costs, others, num_ranks, ranks_per_node)
        if step_s(others, other_firsts) < step_s(counts, firsts) * (1.0 - NEARLY):
            counts, firsts, notes = others, other_firsts, _idle_note(num_ranks - sum(others))
    if not may_overlap or step_s(counts, firsts) <= ideal_s * (1.0 + NEARLY):
        return counts, firsts, notes
    candidates = _overlapping(costs, num_ranks, batch.images)
    found = min(candidates, key=lambda c: (round(step_s(*c) / ideal_s, 2), sum(c[0]), step_s(*c)))
    if step_s(*found) > step_s(counts, firsts) * (1.0 - NEARLY):
        return counts, firsts, notes
    return *found, (f"{len(costs)} networks on {num_ranks} ranks: some ranks hold several",)


def _as_given(
    costs: Sequence[NetworkCost], given: Sequence[range], num_ranks: int
) -> tuple[Sequence[int], Sequence[int], tuple[str, ...]]:
    for work, ranks in zip(costs, given, strict=True):
        if ranks.stop > num_ranks:
            moved = max(0, num_ranks - len(ranks))
            raise PlanError(
                f"students.{work.name}.ranks = {ranks.start}-{ranks.stop - 1}: this job has ranks 0-{num_ranks - 1}",
                fix=f"Write {moved}-{num_ranks - 1} or `ranks: auto`, or start {ranks.stop} processes.",
            )
    hosted = Counter(rank for ranks in given for rank in ranks)
    notes = []
    if idle := num_ranks - len(hosted):
        notes.append(f"{idle} ranks only teach")
    if shared := sum(count > 1 for count in hosted.values()):
        notes.append(f"{shared} ranks hold several students")
    return [len(ranks) for ranks in given], [ranks.start for ranks in given], tuple(notes)


def _overlapping(
    costs: Sequence[NetworkCost], num_ranks: int, images_global: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Counts and first ranks of groups that may overlap: all there are, or the heaviest spread step by step."""
    most = min(num_ranks, images_global)
    requested = _requested(costs)
    allowed = [range(1, most + 1) if count is None else (count,) for count in requested]
    spans = [[(n, first) for n in each for first in range(num_ranks - n + 1)] for each in allowed]
    if math.prod(len(each) for each in spans) <= SEARCH_LIMIT:
        for chosen in product(*spans):
            yield tuple(zip(*chosen, strict=True))  # type: ignore[misc]  # two rows
        return
    counts = [each[0] for each in allowed]
    while True:
        load = [work.image_s / count for work, count in zip(costs, counts, strict=True)]
        yield tuple(counts), tuple(_heaviest_first(load, counts, num_ranks))
        growing = [i for i, each in enumerate(allowed) if counts[i] < each[-1]]
        if not growing:
            return
        heaviest = max(growing, key=lambda index: load[index])
        grown = max(counts[heaviest] + 1, math.ceil(counts[heaviest] * GROWTH))
        counts[heaviest] = min(grown, allowed[heaviest][-1])


def _count_ranks(costs: Sequence[NetworkCost], num_ranks: int) -> tuple[list[int], tuple[str, ...]]:
    """Ranks of each network: as requested, the others by giving each next rank to the network with most work per rank.

    That order makes the heaviest rank as light as any division of the ranks can (each rank goes where
    the maximum is), and the teaching fills what remains below it.
    """
    requested = _requested(costs)
    for work, count in zip(costs, requested, strict=True):
        if count is not None and count > num_ranks:
            raise PlanError(
                f"students.{work.name}.ranks = {count}: this job has {num_ranks} ranks",
                fix=f"Ask for at most {num_ranks}, write `ranks: auto`, or start more processes.",
            )
    counts = [count or 1 for count in requested]
    free = num_ranks - sum(counts)
    if free < 0:
        return counts, (f"{len(costs)} networks on {num_ranks} ranks: some ranks hold several",)
    flexible = [index for index, count in enumerate(requested) if count is None]
    for _ in range(free if flexible else 0):
        heaviest = max(flexible, key=lambda index: costs[index].image_s / counts[index])
        counts[heaviest] += 1
    return counts, _idle_note(num_ranks - sum(counts))


def _idle_note(count: int) -> tuple[str, ...]:
    return (f"{count} ranks only teach",) if count else ()


def _count_by_slices(costs: Sequence[NetworkCost], num_ranks: int, batch: GlobalBatch) -> list[int]:
    """Ranks of each network where slices are coarse: only as many as make the largest slice of the heaviest smaller.

    A rank more than that trains as long as before; it is left to the others, or to teaching.
    """
    requested = _requested(costs)
    counts = [count or 1 for count in requested]
    most = min(num_ranks, batch.images)
    while True:
        load = [c.image_s * batch.largest(n) for c, n in zip(costs, counts, strict=True)]
        heaviest = max(range(len(costs)), key=lambda index: load[index])
        if requested[heaviest] is not None:
            return counts
        largest = batch.largest(counts[heaviest])
        more = range(counts[heaviest] + 1, most + 1)
        needed = next((count for count in more if batch.largest(count) < largest), None)
        if needed is None or sum(counts) - counts[heaviest] + needed > num_ranks:
            return counts
        counts[heaviest] = needed


def _requested(costs: Sequence[NetworkCost]) -> list[int | None]:
    """The number of ranks that each network asks for."""
    return [work.ranks if isinstance(work.ranks, int) else None for work in costs]


def _first_ranks(
    costs: Sequence[NetworkCost], counts: Sequence[int], num_ranks: int, ranks_per_node: int
) -> list[int]:
    """Side by side where they fit, otherwise stacked so that the fullest rank is as light as can be."""
    if sum(counts) <= num_ranks:
        return _side_by_side(counts, ranks_per_node)
    return _stacked([w.image_s / c for w, c in zip(costs, counts, strict=True)], counts, num_ranks)


def _side_by_side(counts: Sequence[int], ranks_per_node: int) -> list[int]:
    """First ranks of contiguous groups, in an order with few groups across node borders.

    The recipe's order unless another is better: of all orders for up to six groups; beyond, the one
    that puts full nodes first and then fills each node with what fits it best.
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
    """Groups of full nodes, then the others, each time the largest remainder that fits the open node."""
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
