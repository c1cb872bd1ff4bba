"""How a batch is divided: evenly over a network's ranks, and teaching into the gaps that students leave (water filling)."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from teacher.shapes import KOLEO_GROUP

LEAST_SHARE = 0.05  # images per step of a rank that has computed targets before
SLACK = 1e-9  # floating-point room when a load is compared with the level


def fill_shares(
    student_s: Sequence[float],
    teach_s: Sequence[float],
    images_global: int,
    unit: int,
    groups: Sequence[range] | None,
) -> list[float]:
    """Shares that fill the gaps: exact ones where steps may differ, full units where they may not or where that costs more.

    ``teach_s``: of each rank per image. ``groups``: ranks that meet after every step, where steps may differ; else None.
    """
    if groups is None:
        return [float(size) for size in fill_units(student_s, teach_s, images_global, unit)]
    return steady_shares(
        fill_exactly(student_s, teach_s, images_global), student_s, teach_s, unit, groups
    )


def refill_shares(
    before: Sequence[float],
    student_s: Sequence[float],
    teach_s: Sequence[float],
    unit: int,
    groups: Sequence[range],
) -> list[float]:
    """Shares that fill the gaps of measured seconds, in the place of those of ``before``."""
    images_global = round(sum(before))
    exact = fill_exactly(student_s, teach_s, images_global)
    # a rank that teaches goes on to, however little: its decoder waits for a step with an image
    least = [LEAST_SHARE if share else 0.0 for share in before]
    floored = [max(share, floor) for share, floor in zip(exact, least, strict=True)]
    scale = images_global / sum(floored)
    scaled = [share * scale for share in floored]
    return steady_shares(scaled, student_s, teach_s, unit, groups)


def steady_shares(
    exact: Sequence[float],
    student_s: Sequence[float],
    teach_s: Sequence[float],
    unit: int,
    groups: Sequence[range],
) -> list[float]:
    """Exact shares, or full units where a step is shorter by them.

    A share that is rounded another way in every step is that long on average. But in a group that meets after
    every step some rank has the larger number in each of them, which is what all of it waits for.
    """
    meets = np.zeros(len(student_s), bool)
    for group in groups:
        meets[group.start : group.stop] |= len(group) > 1
    local, cost, shares = np.asarray(student_s), np.asarray(teach_s), np.asarray(exact)
    if not meets.any():
        return list(exact)
    waited_for = np.where(meets, np.ceil(shares / unit - SLACK) * unit, shares)
    units = np.asarray(fill_units(student_s, teach_s, round(sum(exact)), unit), np.float64)
    is_shorter = (local + cost * units).max() < (local + cost * waited_for).max() - SLACK
    if not is_shorter or ((units == 0) & (shares > 0)).any():  # a rank that teaches goes on to
        return list(exact)
    sizes: list[float] = units.tolist()
    return sizes


def fill_exactly(
    student_s: Sequence[float], teach_s: Sequence[float], images_global: int
) -> list[float]:
    """Shares that make the total load of all ranks equal (water filling), not rounded.

    ``teach_s`` is each rank's time per image: a slow rank teaches less. Ranks whose students
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
    return [max(0.0, level - local) / each for local, each in zip(student_s, teach_s, strict=True)]


def fill_units(
    student_s: Sequence[float], teach_s: Sequence[float], images_global: int, unit: int
) -> list[int]:
    """Shares in full units with the smallest largest load that full units allow; ``teach_s`` of each rank per image.

    The level is found among the loads that some rank would reach with some share; then one unit is
    taken from the fullest rank until the batch is divided.
    """
    local, cost = np.asarray(student_s), np.asarray(teach_s) * unit
    units = images_global // unit
    exact = np.asarray(fill_exactly(student_s, teach_s, images_global)) / unit
    low = np.floor(exact)
    # at the level of the exact filling at most `units` fit; one more unit on every rank is enough
    candidates = sorted({*(local + cost * low), *(local + cost * (low + 1))})

    def fitting(level: float) -> NDArray[np.float64]:
        room: NDArray[np.float64] = np.floor((level - local) / cost + SLACK).clip(min=0.0)
        return room

    index = bisect_left(candidates, True, key=lambda level: bool(fitting(level).sum() >= units))
    sizes = fitting(candidates[index])
    surplus = int(sizes.sum()) - units
    load = np.where(sizes > 0, local + cost * sizes, -np.inf)
    for _ in range(surplus):
        fullest = int(load.argmax())
        sizes[fullest] -= 1
        load[fullest] = load[fullest] - cost[fullest] if sizes[fullest] > 0 else -np.inf
    return [int(size) * unit for size in sizes]


def split_evenly(
    images_global: int, num_parts: int, *, in_groups: bool = False
) -> tuple[range, ...]:
    """Contiguous ranges whose sizes differ by at most one, or by none in full KoLeo groups where those divide.

    ``in_groups``: full KoLeo groups wherever there are enough, so that sizes may differ by one group.
    """
    unit = _unit(images_global, num_parts, in_groups=in_groups)
    units = images_global // unit
    borders = [unit * (units * part // num_parts) for part in range(num_parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(borders))


def largest_part(images_global: int, num_parts: int, *, in_groups: bool = False) -> int:
    """Images of the largest range of ``split_evenly``."""
    unit = _unit(images_global, num_parts, in_groups=in_groups)
    return unit * -(-(images_global // unit) // num_parts)


def _unit(images_global: int, num_parts: int, *, in_groups: bool) -> int:
    """Images that stay together: a KoLeo group where those divide, or where there are enough of them."""
    groups, rest = divmod(images_global, KOLEO_GROUP)
    is_divisible = rest == 0 and (groups % num_parts == 0 or (in_groups and groups >= num_parts))
    return KOLEO_GROUP if is_divisible else 1


def merge_ranges(parts: Sequence[range]) -> tuple[range, ...]:
    """Returns the union of ranges as ascending ranges that neither touch nor overlap."""
    merged: list[range] = []
    for part in sorted((p for p in parts if len(p)), key=lambda p: p.start):
        if merged and part.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, part.stop))
        else:
            merged.append(part)
    return tuple(merged)
