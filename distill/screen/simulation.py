"""Tables of a simulated job: steps, then days."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def simulation_tables(report: Mapping[str, Any]) -> Sequence[Table]:
    """The figures for people: steps by mode, then days by mode and way of saving."""
    title = f"{report['recipe']} on {report['ranks']:,} ranks, jitter {report['jitter']:.1%} (simulated)"
    caption = (
        f"published {report['faster_than_published']:.2f}x as long per step, "
        f"one job per student {report['faster_than_separate']:.2f}x; exchange and group: waits"
    )
    steps = Table(title=title, title_justify="left", caption=caption)
    for column in ("mode", "step, s", "planned", "busy", "exchange", "group", "posts, steps"):
        steps.add_column(column, justify="left" if column == "mode" else "right")
    for name, each in report["modes"].items():
        waits = (each["utilisation"], each["exchange_wait"], each["group_wait"])
        seconds = (f"{each['step_s']:.4g}", f"{each['planned_step_s']:.4g}")
        steps.add_row(
            name, *seconds, *(f"{max(0.0, part):.1%}" for part in waits), f"{each['spread']:.2f}"
        )
    title = (
        f"{report['days']:g} days, a failure every {report['mtbf_h']:.2f} h, seed {report['seed']}"
    )
    caption = "; ".join(
        f"{name}: best every {best['every_s']:.0f} s ({best['goodput']:.2%})"
        for name, best in report["best"].items()
    )
    days = Table(title=title, title_justify="left", caption=caption)
    for column in (
        "mode",
        "saved",
        "every",
        "goodput",
        "stalled",
        "lost",
        "down",
        "failures",
        "GPU hours lost",
    ):
        days.add_column(column, justify="left" if column in ("mode", "saved") else "right")
    for each in report["lives"]:
        parts = (f"{each[name]:.2%}" for name in ("goodput", "stalled", "lost", "down"))
        every = f"{each['every_s']:.0f} s"
        ends = (f"{each['failures']:,}", f"{each['gpu_hours_lost']:,.0f}")
        days.add_row(each["mode"], each["saving"], every, *parts, *ends)
    return steps, days
