"""Figures of a benchmark from the clocks of its ranks: JSON, tables and a picture."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distill.bench_stand_ins import Turn
from distill.cost import DEFAULT_DEVICE, find_device
from distill.plan import Plan
from distill.recipe import FamilyRecipe

OURS, SAVING = "ours", "saving"  # the same job, without and with a save in each turn
SAVE_EVERY_S = 300.0  # what the cost of a save is told as a share of


def build_report(
    family: FamilyRecipe,
    plans: Mapping[str, Plan],
    ranks: Sequence[Mapping[str, Sequence[Turn]]],
    sleep_s: float | None,
    slow: tuple[int, float] | None,
) -> dict[str, Any]:
    """Figures of every mode and what follows from them.

    Args:
        family: the joint job.
        plans: of each mode, by name.
        ranks: of each rank, the turns of each mode.
        sleep_s: seconds of a planned step; None where networks were trained.
        slow: the slow rank and its factor.
    """
    num_ranks, batch = len(ranks), family.schedule.batch
    found = {name: _mode_report([rank[name] for rank in ranks], batch) for name in plans}
    scale = 1.0 if sleep_s is None else sleep_s / plans[OURS].step_s
    for name, figures in found.items():
        plan = plans[name]
        published = name == "published"
        predicted_s = max(plan.even_load_s) if published else plan.step_s
        figures["predicted_utilisation"] = (
            plan.utilisation_even_barrier if published else plan.utilisation
        )
        # without sleeps only ratios between modes are predictions for this machine
        figures["predicted_step_s"] = (
            predicted_s * scale
            if sleep_s is not None
            else predicted_s / plans[OURS].step_s * found[OURS]["step_s"]["median"]
        )
    report: dict[str, Any] = {
        "recipe": family.name,
        "ranks": num_ranks,
        "batch": batch,
        "is_sleeping": sleep_s is not None,
        "slow": slow,
        "modes": found,
    }
    ours = found[OURS]["step_s"]["median"]
    if "published" in found:
        report["faster_than_published"] = found["published"]["step_s"]["median"] / ours
    alone = [figures for name, figures in found.items() if name.startswith("separate ")]
    if alone:
        report["gain"] = sum(figures["step_s"]["median"] for figures in alone) / ours
        report["gain_bound"] = _gain_bound(found[OURS], alone, plans[OURS])
        report["of_bound"] = report["gain"] / report["gain_bound"]
    if SAVING in ranks[0]:
        report["saving"] = _saving_report(ranks)
    if sleep_s is None:
        device = find_device("measured")
        plan = plans[OURS]
        tflops = sum(plan.load_s) * DEFAULT_DEVICE.tflops_per_s * DEFAULT_DEVICE.efficiency
        share = num_ranks if torch.cuda.is_available() else 1  # the cores of one machine are shared
        report["mfu"] = tflops / (ours * share * device.tflops_per_s)
        report["matmul_tflops_per_s"] = device.tflops_per_s
    return report


def _gain_bound(ours: dict[str, Any], alone: list[dict[str, Any]], plan: Plan) -> float:
    """(S C_T + sum C_i) / (C_T + sum C_i) from the seconds measured in the joint job and alone."""
    teaching = sum(ours["teach_s"])
    training = [sum(figures["train_s"]) for figures in alone]
    assert len(training) == len(plan.placements), "one separate job per student"
    return (len(training) * teaching + sum(training)) / (teaching + sum(training))


def _saving_report(ranks: Sequence[Mapping[str, Sequence[Turn]]]) -> dict[str, Any]:
    """What one save costs: a turn of ours with a save in it, until that is on disk, beside the turn without before it."""
    walls = {
        name: _worst([[t.wall_s for t in rank[name]] for rank in ranks]) for name in (OURS, SAVING)
    }
    costs = [saving - ours for saving, ours in zip(walls[SAVING], walls[OURS], strict=True)]
    stalls = _worst([[turn.stall_s for turn in rank[SAVING]] for rank in ranks])
    return {
        "cost_s": _spread(costs),
        "stall_s": _spread(stalls),
        "every_s": SAVE_EVERY_S,
        "share": statistics.median(costs) / SAVE_EVERY_S,
    }


def _worst(ranks: Sequence[Sequence[float]]) -> list[float]:
    """Of each block the longest of any rank, from [rank][block]."""
    return [max(block) for block in zip(*ranks, strict=True)]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "blocks": len(values),
    }


def _mode_report(ranks: Sequence[Sequence[Turn]], batch: int) -> dict[str, Any]:
    """Figures of one mode from the turns of every rank."""
    num_blocks = len(ranks[0])
    step_s, busy, per_rank = [], [], []
    for block in range(num_blocks):
        spans = []
        for turns in ranks:
            first, last = turns[block].marks[0], turns[block].marks[-1]
            spans.append([b - a for a, b in zip(first, last, strict=True)])
        steps = len(ranks[0][block].marks) - 1
        wall = max(span[0] for span in spans)
        step_s.append(wall / steps)
        busy.append(sum(span[1] + span[2] for span in spans) / (len(spans) * wall))
        per_rank.append([[value / steps for value in span] for span in spans])
    middle = sorted(range(num_blocks), key=lambda block: step_s[block])[num_blocks // 2]
    columns = list(zip(*per_rank[middle], strict=True))
    return {
        "step_s": _spread(step_s),
        "images_per_s": batch / statistics.median(step_s),
        "utilisation": statistics.median(busy),
        "teach_s": list(columns[1]),
        "train_s": list(columns[2]),
        "wait_s": list(columns[3]),
        "loader_s": list(columns[4]),
        "host_s": [wall - sum(rest) for wall, *rest in zip(*columns[:5], strict=True)],
        "exchange_bytes_max": max(columns[5]),
    }


def tables(report: dict[str, Any]) -> list[Any]:
    """The figures for people: a row per mode, and what follows from them."""
    from rich.table import Table

    title = f"{report['recipe']} on {report['ranks']} ranks, batch {report['batch']}"
    table = Table(title=title, title_justify="left")
    for column in (
        "mode",
        "step s (min - max)",
        "predicted",
        "images/s",
        "busy",
        "predicted",
        "MB",
    ):
        table.add_column(column)
    for name, found in report["modes"].items():
        step = found["step_s"]
        table.add_row(
            name,
            f"{step['median']:.3f} ({step['min']:.3f} - {step['max']:.3f})",
            f"{found['predicted_step_s']:.3f}",
            f"{found['images_per_s']:,.0f}",
            f"{found['utilisation']:.1%}",
            f"{found['predicted_utilisation']:.1%}",
            f"{found['exchange_bytes_max'] / 1e6:.2f}",
        )
    facts = Table(show_header=False, box=None, padding=(0, 2))
    if "faster_than_published" in report:
        facts.add_row("published", f"{report['faster_than_published']:.2f}x as long per step")
    if "gain" in report:
        told = f"{report['gain']:.2f}x of at most {report['gain_bound']:.2f}x ({report['of_bound']:.1%})"
        facts.add_row("gain over separate jobs", told)
    ours = report["modes"][OURS]
    host_s = statistics.median(ours["host_s"])
    facts.add_row("beside all that", f"{host_s * 1000:.1f} ms of a step of ours")
    loader_share = statistics.median(ours["loader_s"]) / ours["step_s"]["median"]
    facts.add_row("waiting for images", f"{loader_share:.2%} of a step of ours")
    if "saving" in report:
        saving = report["saving"]
        cost, stall = saving["cost_s"], saving["stall_s"]
        told = (
            f"{cost['median']:.2f} s ({cost['min']:.2f} - {cost['max']:.2f}), "
            f"{saving['share']:.2%} of {saving['every_s']:.0f} s; the loop waits for {stall['median']:.2f} s of it"
        )
        facts.add_row("a checkpoint costs", told)
    if "mfu" in report:
        peak = report["matmul_tflops_per_s"]
        facts.add_row("MFU", f"{report['mfu']:.1%} of a matrix product's {peak:.3g} TFLOP/s")
    return [table, facts]


def draw(report: dict[str, Any], path: Path) -> None:
    """A picture: for each of the joint modes, what every rank does during a mean step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modes = [name for name in ("ours", "published") if name in report["modes"]]
    longest = max(report["modes"][name]["step_s"]["median"] for name in modes)
    ranks = report["ranks"]
    figure = Figure(figsize=(8, 0.9 + len(modes) * (0.7 + 0.22 * ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(len(modes), 1, squeeze=False).flat, modes, strict=True):
        found = report["modes"][name]
        step_s = found["step_s"]["median"]
        for rank in range(ranks):
            teach, train = found["teach_s"][rank], found["train_s"][rank]
            rest = max(0.0, step_s - teach - train)
            left = 0.0
            for length, colour in ((teach, "#4477aa"), (train, "#ee8866"), (rest, "#dddddd")):
                axes.barh(rank, length, left=left, color=colour, edgecolor="white", linewidth=0.5)
                left += length
        axes.set_title(
            f"{name}: {step_s:.3f} s a step, busy {found['utilisation']:.0%}", loc="left"
        )
        axes.set_xlim(0, longest * 1.02)
        axes.set_ylabel("rank")
        axes.set_yticks(range(ranks))
        axes.invert_yaxis()
    axes.set_xlabel("seconds: teaching (blue), training (orange), idle (grey)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def save_report(report: dict[str, Any], path: Path) -> None:
    """Writes the figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
