"""Tables of scores, plans and files of weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from distill.plan.flops import Device
    from distill.plan.job import JobPlan
    from distill.plan.memory import Footprint
    from distill.plan.plan import Plan
    from distill.weights.inspect import Inspection
from distill.screen.words import NOTHING, duration, number_text

BASELINES = {"pixels": "raw pixels", "colour": "colour mean and spread"}


def scores_table(summary: Mapping[str, Any]) -> Table:
    """The scores of ``summary.json``: a row per network beside its untrained copy, then baselines.

    A run whose images have no labels has no scores; the caption then gives the reason.
    """
    table = Table(
        title="k-NN on held-out images, balanced accuracy (protocol quick, k = 5)",
        title_justify="left",
    )
    table.add_column("network")
    for heading in ("k-NN", "untrained", "gain", "loss"):
        table.add_column(heading, justify="right")
    for name, knn, untrained, loss in score_rows(summary):
        gain = NOTHING if knn is None or untrained is None else f"{knn - untrained:+.3f}"
        cells = [
            score_text(knn),
            score_text(untrained),
            gain,
            NOTHING if loss is None else number_text(loss),
        ]
        table.add_row(name, *cells)
    table.add_section()
    baselines = summary.get("baselines", {})
    for key, label in BASELINES.items():
        if key in baselines:
            table.add_row(label, score_text(baselines[key]), "", "", "", style="dim")
    notes = [str(summary["knn_reason"])] if summary.get("knn_reason") else []
    if without := summary.get("images", {}).get("without_label"):
        notes.append(f"{without:,} images have no label and are left out")
    table.caption = "\n".join(notes + unfinished_students(summary, has_reason=True)) or None
    return table


def unfinished_students(summary: Mapping[str, Any], *, has_reason: bool = False) -> list[str]:
    """A line for every student of ``summary.json`` that is parked or was never trained, with the cause where it is wanted."""
    lines = []
    for name, entry in summary.get("students", {}).items():
        parked, steps = entry.get("parked"), entry.get("steps")
        if not parked and steps != 0:
            continue
        since = f"is parked since step {parked['step']}, " if parked else "was "
        trained = "never trained, not exported" if steps == 0 else f"trained for {steps} steps"
        reason = f": {parked['reason']}" if parked and has_reason else ""
        lines.append(f"{name} {since}{trained}{reason}")
    return lines


Score = float | None


def score_rows(summary: Mapping[str, Any]) -> list[tuple[str, Score, Score, Score]]:
    """Name, score, untrained score and loss of the teacher and each student."""
    networks = {"teacher": summary["teacher"]} if "teacher" in summary else {}
    networks.update(summary.get("students", {}))
    untrained = summary.get("baselines", {}).get("untrained", {})
    return [
        (name, entry.get("knn"), untrained.get(name), entry.get("loss"))
        for name, entry in networks.items()
    ]


def score_text(value: Score) -> str:
    """Three decimals, or a dash for no score."""
    return NOTHING if value is None else f"{value:.3f}"


def plan_tables(job: "JobPlan", device: "Device") -> list[Table]:
    """Placement, slices, shares and seconds of a plan, a row per network and one for the teaching; then what it needs."""
    plan = job.plan
    busy = f"busy {plan.utilisation:.0%} (even shares and a barrier: {plan.utilisation_even_barrier:.0%})"
    table = Table(
        title=f"{job.name}: {plan.num_ranks} ranks, {plan.images_global} images a step, {busy}",
        title_justify="left",
    )
    columns = ["network", "ranks", "images per rank", "seconds per rank", "GiB at most"]
    is_cut = any(placement.num_parts > 1 for placement in plan.placements)
    for column in columns[:3] + ["at once"] * is_cut + columns[3:]:
        table.add_column(column)

    def gib(ranks: range) -> str:
        return f"{max(job.footprint.memory[rank].total for rank in ranks):.1f}"

    for placement, image_s in zip(plan.placements, plan.image_s, strict=True):
        ranks = placement.world_ranks
        shown = str(ranks.start) if len(ranks) == 1 else f"{ranks.start}-{ranks.stop - 1}"
        seconds = image_s * placement.largest_slice
        at_once = [str(placement.most_at_once)] * is_cut
        sizes = _sizes(placement.slices)
        table.add_row(placement.name, shown, sizes, *at_once, f"{seconds:.3g}", gib(ranks))
    low, high = (plan.teach_s * each(plan.mean_shares) for each in (min, max))
    spread = f"{low:.3g} to {high:.3g}" if high > low else f"{low:.3g}"
    everyone = range(plan.num_ranks)
    shown = f"0-{plan.num_ranks - 1}"
    table.add_row("teaching", shown, _shares(plan), *[""] * is_cut, spread, gib(everyone))
    if plan.notes:
        table.caption, table.caption_justify = "; ".join(plan.notes), "left"
    facts = Table(show_header=False, box=None, padding=(0, 2))
    rate = plan.images_global / plan.step_s
    days = job.seconds / 86_400
    length = f"{days:.1f} days" if days >= 1 else duration(days * 86_400)
    facts.add_row(
        "speed",
        f"{plan.step_s:.3g} s a step, {rate:,.0f} images/s, {length} for {job.num_steps:,} steps, {_condition(device)}",
    )
    if len(plan.placements) > 1:
        facts.add_row(
            "gain", f"{plan.gain:.2f}x over separate jobs, of at most {plan.gain_bound:.2f}x"
        )
    _add_footprint(facts, job.footprint)
    return [table, facts]


def _condition(device: "Device") -> str:
    """What the seconds of a plan rest on."""
    if device.costs is not None:
        return f"by the seconds per image of {device.costs.source}"
    return f"if {device.name} reaches {device.efficiency:.0%} of {device.tflops_per_s:.3g} TFLOP/s"


def _add_footprint(facts: Table, footprint: "Footprint") -> None:
    memory = footprint.fullest
    parts = ", ".join(
        f"{name} {value:.1f}" for name, value in asdict(memory).items() if value >= 0.05
    )
    facts.add_row("memory", f"{memory.total:.1f} GiB on the fullest rank ({parts})")
    if not footprint.gathered_bytes:
        return
    most = max(footprint.sliced_bytes) / 1e6
    facts.add_row(
        "exchange",
        f"at most {most:,.1f} MB to a rank per step; all features to all ranks: {footprint.gathered_bytes / 1e6:,.0f} MB",
    )


def inspection_table(found: "Inspection") -> Table:
    """What a file of weights is."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    what = found.what if found.arch is None else f"{found.what}, {found.arch}"
    table.add_row("file", found.path)
    table.add_row("is", f"{what} ({found.layout} layout)" if found.layout else what)
    if found.released is not None:
        table.add_row("file name is", f"the released {found.released}")
    size = f"{found.num_bytes / 1e6:,.1f} MB, {', '.join(found.dtypes)}"
    table.add_row("holds", f"{found.parameters:,} numbers in {found.tensors} tensors, {size}")
    if found.has_nan is not None:
        table.add_row("values", "some are not finite" if found.has_nan else "all finite")
    for note in found.notes:
        table.add_row("note", note)
    return table


MOST_RUNS = 6  # of equal numbers that are written out


def _sizes(parts: Sequence[range]) -> str:
    """Sizes of ranges, runs of equal ones counted: ``2 x 32, 17``."""
    return _runs([len(part) for part in parts])


def _shares(plan: "Plan") -> str:
    """Images each rank teaches per step, on average where they change from step to step."""
    return _runs([round(share, 1) for share in plan.mean_shares])


def _runs(values: Sequence[float]) -> str:
    """Numbers with runs of equal ones counted; their range where there are too many runs."""
    runs = [(len(list(run)), value) for value, run in groupby(values)]
    if len(runs) > MOST_RUNS:
        return f"{min(values):g} to {max(values):g}, mean {sum(values) / len(values):.1f}"
    return ", ".join(f"{count} x {size:g}" if count > 1 else f"{size:g}" for count, size in runs)
