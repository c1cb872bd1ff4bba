"""How many micro-batches a step each network has: as in the recipe, or as few as memory allows.

    engine.micro_batch    16, 32, ...    as many as its largest slice needs
                          auto           1, and more where a rank of some stage would be too full
                          null           1: a slice at once

A network has as many on each of its ranks and in every stage, since its engine adds up that many gradients before
it steps. On a rank whose slice has fewer KoLeo groups than the fullest, one may be empty. ``auto`` cuts groups where
nothing else fits: then KoLeo's gradient is that of the slice (``distill.engine.micro_batches``).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from distill.plan.memory import GIB, Footprint
from distill.plan.plan import Plan
from distill.plan.slices import Placement
from teacher.shapes import KOLEO_GROUP

AUTO = "auto"
FULL = 0.9  # of a device's memory: an estimate is within 10%


def in_micro_batches(plan: Plan, micro_batch: int | str | None) -> Plan:
    """The plan with micro-batches of at most so many images; ``auto`` cuts nothing."""
    if not isinstance(micro_batch, int):
        return plan
    counts = {p.name: -(-p.largest_slice // micro_batch) for p in plan.placements}
    return _with(plan, counts)


def has_room(footprints: Sequence[Footprint], memory_gib: float) -> bool:
    """Whether plans need no more than ``FULL`` of a device's memory."""
    return max(each.fullest.total for each in footprints) <= FULL * memory_gib


def fitted(
    plans: Sequence[Plan],
    footprints: Callable[[Sequence[Plan]], Sequence[Footprint]],
    image_bytes: Sequence[Mapping[str, float]],
    memory_gib: float,
    uncut: Collection[str] = (),
) -> tuple[Plan, ...]:
    """The plans of all stages with as few micro-batches as fit, or as many as there can be where nothing fits.

    Args:
        plans: of the stages, with the same networks.
        footprints: what plans need, one for each stage.
        image_bytes: by stage and network, what an image takes in memory while it is trained on.
        memory_gib: of a device.
        uncut: networks whose KoLeo groups may not be cut.
    """
    plans, memory_gib = tuple(plans), FULL * memory_gib
    while True:
        found = footprints(plans)
        stage = max(range(len(plans)), key=lambda index: found[index].fullest.total)
        rank, full = found[stage].fullest_rank, found[stage].fullest
        if full.total <= memory_gib:
            return plans
        per_image = image_bytes[stage]
        hosted = [p for p in plans[stage].placements if rank in p.world_ranks]
        heaviest = max(hosted, key=lambda p: p.images_at_once(rank) * per_image[p.name])
        others = full.total - full.activations - full.logits
        room = (memory_gib - others) * GIB / per_image[heaviest.name]
        least = KOLEO_GROUP if heaviest.name in uncut else 1
        most = most_parts(plans, heaviest.name, least)
        count = _next_count(heaviest, rank, room, most)
        if count is None:
            return plans
        plans = tuple(_with(plan, {heaviest.name: count}) for plan in plans)


def fitted_alone(
    plans: Sequence[Plan],
    footprints: Callable[[Sequence[Plan]], Sequence[Footprint]],
    memory_gib: float,
    uncut: Collection[str] = (),
) -> tuple[Plan, ...]:
    """As ``fitted``, of plans of one network, whose footprints have what its images take."""
    image_bytes = []
    for plan, found in zip(plans, footprints(plans), strict=True):
        (placement,) = plan.placements
        taken = (found.fullest.activations + found.fullest.logits) * GIB
        image_bytes.append({placement.name: taken / placement.most_at_once})
    return fitted(plans, footprints, image_bytes, memory_gib, uncut)


def most_parts(plans: Sequence[Plan], name: str, least: int) -> int:
    """Micro-batches that a network can have in every stage, of ``least`` images on its fullest rank."""
    placements = [p for plan in plans for p in plan.placements if p.name == name]
    slices = [part for p in placements for part in p.slices]
    if any(part.start % least or len(part) % least for part in slices):
        return 1
    return min(p.largest_slice for p in placements) // least


def _next_count(placement: Placement, rank: int, room: float, most: int) -> int | None:
    """The least larger number of micro-batches whose images have room, the most where none has; None beyond that."""
    now = placement.num_parts
    for count in range(now + 1, most + 1):
        if count == most or replace(placement, num_parts=count).images_at_once(rank) <= room:
            return count
    return None


def _with(plan: Plan, counts: Mapping[str, int]) -> Plan:
    placements = tuple(
        replace(p, num_parts=counts.get(p.name, p.num_parts)) for p in plan.placements
    )
    return replace(plan, placements=placements)
