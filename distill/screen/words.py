"""Numbers, times and ranks as text."""

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from statistics import fmean

BARS = "▁▂▃▄▅▆▇█"
NOTHING = "-"


def time_of_day(unix: float, now_unix: float) -> str:
    """The local time of day to the second, with the date when that is not today's."""
    local_time = datetime.fromtimestamp(unix)
    is_today = local_time.date() == datetime.fromtimestamp(now_unix).date()
    return local_time.strftime("%H:%M:%S" if is_today else "%a %d %b %H:%M:%S")


def sparkline(values: Sequence[float], num_cells: int) -> str:
    """At most ``num_cells`` bars for the means of equal runs of ``values``, lowest to highest.

    Values that are not finite are left out; a flat line is drawn in the middle.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    cells = min(num_cells, len(finite))
    edges = [index * len(finite) // cells for index in range(cells + 1)]
    means = [fmean(finite[edges[index] : edges[index + 1]]) for index in range(cells)]
    low, high = min(means), max(means)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # rounding, not a trend
        return BARS[3] * cells
    return "".join(BARS[round((mean - low) / (high - low) * (len(BARS) - 1))] for mean in means)


def rank_ranges(ranks: Sequence[int]) -> str:
    """Ranks as short ranges: ``0-3,8``."""
    ranges: list[list[int]] = []
    for world_rank in sorted(ranks):
        if ranges and world_rank == ranges[-1][-1] + 1:
            ranges[-1][1:] = [world_rank]
        else:
            ranges.append([world_rank])
    return ",".join("-".join(str(edge) for edge in entry) for entry in ranges)


def duration(seconds: float) -> str:
    """A length of time in its two largest units: ``12 d 20 h``, ``3 min 05 s``, ``8 s``."""
    total = max(0, round(seconds))
    minutes, rest_s = divmod(total, 60)
    hours, rest_minutes = divmod(minutes, 60)
    days, rest_hours = divmod(hours, 24)
    if days:
        return f"{days} d {rest_hours} h"
    if hours:
        return f"{hours} h {rest_minutes:02d} min"
    if minutes:
        return f"{minutes} min {rest_s:02d} s"
    return f"{rest_s} s"


def clock_time(unix: float, now_unix: float) -> str:
    """The local time of day, with the date when it is not within the next twelve hours."""
    local_time = datetime.fromtimestamp(unix)
    is_far = abs(local_time - datetime.fromtimestamp(now_unix)) > timedelta(hours=12)
    return local_time.strftime("%a %d %b %H:%M") if is_far else local_time.strftime("%H:%M")


def count_text(count: int, one: str, many: str) -> str:
    """A count with its noun in the singular or plural."""
    return f"{count} {one if count == 1 else many}"


def steps_text(count: int) -> str:
    """An integer with thin groups of thousands: ``41 900``."""
    return f"{count:,}".replace(",", " ")


def number_text(value: float) -> str:
    """Three decimals, or three digits from 100 on."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"


def rate_text(value: float) -> str:
    """A rate: one decimal below 10, an integer above."""
    return f"{value:.1f}" if value < 10 else f"{steps_text(round(value))}"
