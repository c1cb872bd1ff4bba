"""Figures of a benchmark from the clocks of its ranks: JSON, tables and a picture."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distill.bench.modes import BY_FLOPS, OURS, PUBLISHED, SAVING
from distill.bench.stand_ins import Turn
from distill.plan.flops import DEFAULT_DEVICE, find_device
from distill.plan.plan import Plan
from distill.recipe.keys import FamilyRecipe
from distill.runfolder.heartbeat import WAITING as WAITING_ACTIVITIES

SAVE_EVERY_S = 300.0  # the cost of a save is given as a share of this


def build_report(
    family: FamilyRecipe,
    plans: Mapping[str, Plan],
    ranks: Sequence[Mapping[str, Sequence[Turn]]],
    sleep_s: float | None,
    slow: tuple[int, float] | None,
    flops_s: float,
) -> dict[str, Any]:
    """Figures of every mode and what follows from them.

    Args:
        family: the joint job.
        plans: of each mode, by name.
        ranks: of each rank, the turns of each mode.
        sleep_s: seconds of a planned step; None where networks were trained.
        slow: the slow rank and its factor.
        flops_s: seconds of a joint step's FLOPs, of all ranks together, on ``DEFAULT_DEVICE``.
    """
    num_ranks, batch = len(ranks), family.schedule.batch
    found = {name: _mode_report([rank[name] for rank in ranks], batch) for name in plans}
    scale = 1.0 if sleep_s is None else sleep_s / plans[OURS].step_s
    for name, figures in found.items():
        plan = plans[name]
        is_even = name == PUBLISHED
        busy = plan.utilisation_even_barrier if is_even else plan.utilisation
        predicted_s = max(plan.even_load_s) if is_even else plan.step_s
        figures["predicted_utilisation"] = busy
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
        "networks": [student.label for student in family.students],
        "is_sleeping": sleep_s is not None,
        "slow": slow,
        "modes": found,
    }
    report |= _image_costs([rank[OURS] for rank in ranks], batch)
    ours = found[OURS]["step_s"]["median"]
    for key, name in (("published", PUBLISHED), ("by_flops", BY_FLOPS)):
        if name in found:
            report[f"faster_than_{key}"] = found[name]["step_s"]["median"] / ours
    alone = [figures for name, figures in found.items() if name.startswith("separate ")]
    if alone:
        report["gain"] = sum(figures["step_s"]["median"] for figures in alone) / ours
        report["gain_bound"] = _gain_bound(found[OURS], alone, plans[OURS])
        report["of_bound"] = report["gain"] / report["gain_bound"]
    if SAVING in ranks[0]:
        report["saving"] = _saving_report(ranks)
    if sleep_s is None:
        report |= _mfu(flops_s / ours, num_ranks)
    return report


def _mfu(seconds_per_s: float, num_ranks: int) -> dict[str, float]:
    """Part of a matrix product's rate here that was reached, from the seconds of ``DEFAULT_DEVICE`` done in one."""
    device = find_device("measured")
    tflops_per_s = seconds_per_s * DEFAULT_DEVICE.tflops_per_s * DEFAULT_DEVICE.efficiency
    share = num_ranks if torch.cuda.is_available() else 1  # the cores of one machine are shared
    mfu = tflops_per_s / (share * device.tflops_per_s)
    return {"mfu": mfu, "matmul_tflops_per_s": device.tflops_per_s}


def _gain_bound(ours: dict[str, Any], alone: list[dict[str, Any]], plan: Plan) -> float:
    """(S C_T + sum C_i) / (C_T + sum C_i) from the seconds measured in the joint job and alone."""
    teaching = sum(ours["teach_s"])
    training = [sum(figures["train_s"]) for figures in alone]
    assert len(training) == len(plan.placements), "one separate job per student"
    return (len(training) * teaching + sum(training)) / (teaching + sum(training))


def _image_costs(ranks: Sequence[Sequence[Turn]], batch: int) -> dict[str, Any]:
    """Seconds per image of the teacher and of each network, as ``--costs`` takes them: medians over blocks of what all ranks spent."""
    teach_s, network_s = list[float](), dict[str, list[float]]()
    for turns in zip(*ranks, strict=True):
        images = batch * turns[0].num_steps
        teach_s.append(sum(t.last.teaching_s - t.first.teaching_s for t in turns) / images)
        spent: dict[str, float] = {}
        for turn in turns:
            for name, total_s in turn.last.network_s.items():
                spent[name] = spent.get(name, 0.0) + total_s - turn.first.network_s[name]
        for name, total_s in spent.items():
            network_s.setdefault(name, []).append(total_s / images)
    image_s = {name: statistics.median(each) for name, each in network_s.items()}
    return {"teach_s": statistics.median(teach_s), "image_s": image_s}


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
            pairs = zip(turns[block].first[:-1], turns[block].last[:-1], strict=True)
            spans.append([last - first for first, last in pairs])
        steps = ranks[0][block].num_steps
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
            f"{found.get('simulated_step_s', found['predicted_step_s']):.3f}",
            f"{found['images_per_s']:,.0f}",
            f"{found['utilisation']:.1%}",
            f"{found['predicted_utilisation']:.1%}",
            f"{found['exchange_bytes_max'] / 1e6:.2f}",
        )
    facts = Table(show_header=False, box=None, padding=(0, 2))
    if "faster_than_published" in report:
        facts.add_row("published", f"{report['faster_than_published']:.2f}x as long per step")
    if BY_FLOPS in report["modes"]:
        text = f"{report['faster_than_by_flops']:.2f}x as long per step"
        facts.add_row("placed by FLOPs", text)
    if "gain" in report:
        text = f"{report['gain']:.2f}x of at most {report['gain_bound']:.2f}x ({report['of_bound']:.1%})"
        facts.add_row("gain over separate jobs", text)
    ours = report["modes"][OURS]
    host_s = statistics.median(ours["host_s"])
    facts.add_row("beside all that", f"{host_s * 1000:.1f} ms of a step of ours")
    loader_share = statistics.median(ours["loader_s"]) / ours["step_s"]["median"]
    facts.add_row("waiting for images", f"{loader_share:.2%} of a step of ours")
    if "saving" in report:
        saving = report["saving"]
        cost, stall = saving["cost_s"], saving["stall_s"]
        text = (
            f"{cost['median']:.2f} s ({cost['min']:.2f} - {cost['max']:.2f}), "
            f"{saving['share']:.2%} of {saving['every_s']:.0f} s; the loop waits for {stall['median']:.2f} s of it"
        )
        facts.add_row("a checkpoint costs", text)
    if "mfu" in report:
        peak = report["matmul_tflops_per_s"]
        facts.add_row("MFU", f"{report['mfu']:.1%} of a matrix product's {peak:.3g} TFLOP/s")
    return [table, _table_of_ranks(report), facts]


def _table_of_ranks(report: dict[str, Any]) -> Any:
    """What each rank spent a step on, in the joint modes."""
    from rich.table import Table

    table = Table(title="seconds of a rank and step", title_justify="left")
    for column in ("mode", "rank", "teaching", "training", "exchange", "images", "beside all that"):
        table.add_column(column, justify="left" if column == "mode" else "right")
    phases = ("teach_s", "train_s", "wait_s", "loader_s", "host_s")
    for name in (OURS, BY_FLOPS, PUBLISHED):
        if name in report["modes"]:
            found = report["modes"][name]
            for rank in range(report["ranks"]):
                cells = [f"{found[phase][rank]:.3f}" for phase in phases]
                table.add_row("" if rank else name, str(rank), *cells)
    return table


TEACHING, WAITING, LOADING, REST = "#4477aa", "#dddddd", "#66ccee", "#999999"
TRAINING = ("#ee8866", "#eedd88", "#bbcc33", "#ffaabb", "#44bb99", "#aa4499", "#cc6677", "#ddaa33")


def plot_report(report: dict[str, Any], path: Path) -> None:
    """A picture: what every rank does during one step of each mode, from the end of rank 0's step before."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    modes, ranks = report["modes"], report["ranks"]
    names = [str(name) for name in report["networks"]]
    training = {name: TRAINING[i % len(TRAINING)] for i, name in enumerate(names)}
    longest = max(span[1] for found in modes.values() for row in found["timeline"] for span in row)
    height = 0.9 + len(modes) * (0.7 + 0.22 * ranks)
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(modes), 1, squeeze=False).flat
    for axes, (name, found) in zip(panels, modes.items(), strict=True):
        for rank, row in enumerate(found["timeline"]):
            for start, stop, activity, network in row:
                colour = _colour(activity, training.get(network))
                axes.barh(rank, stop - start, left=start, color=colour, height=0.85, linewidth=0)
        step_s = found["step_s"]["median"]
        text = f"{name}: {step_s:.3g} s a step (median), busy {found['utilisation']:.0%}"
        axes.set_title(text, loc="left", fontsize="medium")
        axes.set_xlim(0, longest * 1.02)
        axes.set_yticks(range(ranks))
        axes.set_ylabel("rank")
        axes.invert_yaxis()
    axes.set_xlabel("seconds")
    entries = {"teaching": TEACHING, **training, "loading": LOADING, "waiting": WAITING}
    entries["post-step, saving"] = REST
    handles = [Patch(color=colour, label=label) for label, colour in entries.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _colour(activity: str, training: str | None) -> str:
    if activity == "learning" and training is not None:
        return training
    known = {"teaching": TEACHING, "loading": LOADING}
    return known.get(activity, WAITING if activity in WAITING_ACTIVITIES else REST)
