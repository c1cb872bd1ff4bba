"""Recipe and number of ranks in, plan out: who trains where, who teaches how much. Pure: no process group, no device.

Teaching is divisible to one image and is the larger part of the work, so it fills the gaps that
students leave (water filling): rank r teaches ``n_r`` images so that ``n_r * teacher cost + its
students' cost`` is as equal as possible. Shares and slices are contiguous ranges of positions in
the global batch, in rank order; together they say exactly which image goes where.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from distill.errors import PlanError
from teacher.trainee import KOLEO_GROUP


@dataclass(frozen=True)
class Work:
    """One trained network before it is placed: teraflops per image, and how many ranks it asks for (None: any)."""

    name: str
    tflops_per_image: float
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

    @property
    def koleo_is_local(self) -> bool:
        """No KoLeo group is cut by a slice border."""
        return all(part.start % KOLEO_GROUP == 0 for part in self.slices)


@dataclass(frozen=True)
class Plan:
    """The division of every step's work over the ranks."""

    images_global: int
    num_ranks: int
    shares: tuple[range, ...]
    placements: tuple[Placement, ...]
    load_tflops: tuple[float, ...]
    even_load_tflops: tuple[float, ...]
    notes: tuple[str, ...]

    def needs(self, world_rank: int) -> tuple[range, ...]:
        """Positions a rank receives: the union of its students' slices, merged and ascending."""
        merged: list[range] = []
        slices = (p.slice_of(world_rank) for p in self.placements if world_rank in p.world_ranks)
        for part in sorted((s for s in slices if len(s)), key=lambda s: s.start):
            if merged and part.start <= merged[-1].stop:
                merged[-1] = range(merged[-1].start, max(merged[-1].stop, part.stop))
            else:
                merged.append(part)
        return tuple(merged)

    @property
    def is_local(self) -> bool:
        """Every rank teaches exactly what it trains on: nothing has to travel."""
        return all(
            self.needs(r) == ((self.shares[r],) if len(self.shares[r]) else ())
            for r in range(self.num_ranks)
        )

    @property
    def utilisation(self) -> float:
        """Mean load over the largest: the bound on how busy the ranks can be."""
        return sum(self.load_tflops) / (self.num_ranks * max(self.load_tflops))

    @property
    def utilisation_even(self) -> float:
        """The same bound with equal teacher shares."""
        return sum(self.even_load_tflops) / (self.num_ranks * max(self.even_load_tflops))

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, for ``plan.json`` and ``--json``."""
        return {
            "images_global": self.images_global,
            "num_ranks": self.num_ranks,
            "ranks": {p.name: len(p.slices) for p in self.placements},
            "placements": {
                p.name: [p.world_ranks.start, p.world_ranks.stop] for p in self.placements
            },
            "slices": {p.name: [len(s) for s in p.slices] for p in self.placements},
            "shares": [len(s) for s in self.shares],
            "utilisation": self.utilisation,
            "utilisation_even": self.utilisation_even,
            "notes": list(self.notes),
        }


def make_plan(
    works: Sequence[Work], teaching_tflops: float, images_global: int, num_ranks: int
) -> Plan:
    """Places networks on ranks and divides the teaching.

    Raises:
        PlanError: no ranks, fewer images than ranks of a network, or a network that asks for more
        ranks than there are.
    """
    if num_ranks < 1:
        raise PlanError(f"{num_ranks} ranks: at least one is needed", fix="Pass --gpus 1 or more.")
    counts, notes = _count_ranks(works, num_ranks)
    for work, count in zip(works, counts, strict=True):
        if count > images_global:
            raise PlanError(
                f"{work.name}: {count} ranks for a batch of {images_global} images leaves ranks without an image",
                fix=f"Use at most {images_global} ranks, or a larger schedule.batch.",
            )
    placements = _place(works, counts, images_global, num_ranks)
    cost = {work.name: work.tflops_per_image for work in works}
    student_load = [
        sum(cost[p.name] * len(p.slice_of(rank)) for p in placements if rank in p.world_ranks)
        for rank in range(num_ranks)
    ]
    if all(len(p.slices) == num_ranks for p in placements):
        shares = placements[0].slices  # nothing to fill, and nothing has to travel
    else:
        shares = fill_shares(student_load, teaching_tflops, images_global)
    even = split_evenly(images_global, num_ranks)
    return Plan(
        images_global=images_global,
        num_ranks=num_ranks,
        shares=shares,
        placements=placements,
        load_tflops=tuple(
            load + teaching_tflops * len(share)
            for load, share in zip(student_load, shares, strict=True)
        ),
        even_load_tflops=tuple(
            load + teaching_tflops * len(share)
            for load, share in zip(student_load, even, strict=True)
        ),
        notes=notes,
    )


def _count_ranks(works: Sequence[Work], num_ranks: int) -> tuple[list[int], tuple[str, ...]]:
    """Ranks of each network: as asked, the others by giving each next rank to whoever has most work per rank."""
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
        heaviest = max(flexible, key=lambda index: works[index].tflops_per_image / counts[index])
        counts[heaviest] += 1
    idle = num_ranks - sum(counts)
    return counts, ((f"{idle} ranks only teach",) if idle else ())


def _place(
    works: Sequence[Work], counts: Sequence[int], images_global: int, num_ranks: int
) -> tuple[Placement, ...]:
    """Side by side where they fit; otherwise the heaviest first, each onto the least loaded neighbouring ranks."""
    firsts = [0] * len(works)
    if sum(counts) <= num_ranks:
        firsts = [sum(counts[:index]) for index in range(len(works))]
    else:
        load = [0.0] * num_ranks
        for index in sorted(
            range(len(works)), key=lambda i: -works[i].tflops_per_image / counts[i]
        ):
            count = counts[index]
            firsts[index] = min(
                range(num_ranks - count + 1), key=lambda first: max(load[first : first + count])
            )
            for rank in range(firsts[index], firsts[index] + count):
                load[rank] += works[index].tflops_per_image / count
    return tuple(
        Placement(work.name, first, split_evenly(images_global, count))
        for work, first, count in zip(works, firsts, counts, strict=True)
    )


def split_evenly(images_global: int, num_parts: int) -> tuple[range, ...]:
    """Contiguous ranges whose sizes differ by at most one, or by none in whole KoLeo groups where those divide."""
    unit = KOLEO_GROUP if images_global % (KOLEO_GROUP * num_parts) == 0 else 1
    units = images_global // unit
    borders = [unit * (units * part // num_parts) for part in range(num_parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(borders))


def fill_shares(
    student_load: Sequence[float], teaching_tflops: float, images_global: int
) -> tuple[range, ...]:
    """Teacher shares that make all ranks' total load as equal as whole images allow (water filling).

    Ranks whose students already exceed the level teach nothing.
    """
    level_of = sorted(student_load)
    level, wet = 0.0, 0
    for count in range(1, len(level_of) + 1):
        level = (images_global * teaching_tflops + sum(level_of[:count])) / count
        wet = count
        if count == len(level_of) or level <= level_of[count]:
            break
    assert wet > 0, "no rank to teach on"
    exact = [max(0.0, level - load) / teaching_tflops for load in student_load]
    sizes = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda rank: (sizes[rank] - exact[rank], rank))
    for rank in by_remainder[: images_global - sum(sizes)]:
        sizes[rank] += 1
    borders = [sum(sizes[:rank]) for rank in range(len(sizes) + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(borders))
