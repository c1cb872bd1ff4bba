"""``distill bench step``: what a step needs of a GPU, by counting, and the time that it takes at least, by the formula of ``distill.bench.roofline``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from distill.bench.compiled_work import Compiler
from distill.bench.meta_work import PHASES, FamilyWork, Traced, trace_student, trace_teacher
from distill.bench.roofline import HOOK_S, LAUNCH_S, RATES, Hardware, Work, estimate
from distill.bench.trace import Counts
from distill.engine.compile_choice import what_is_lacking
from distill.errors import SetupError
from distill.plan.flops import DEVICES
from distill.plan.from_recipe import TeacherShape, plan_family
from distill.plan.plan import Plan
from distill.recipe.keys import FamilyRecipe

MB, TERA = 1e6, 1e12


@dataclass(frozen=True)
class StepRequest:
    """What is to be counted: a family on some ranks, each with one such GPU."""

    recipe: FamilyRecipe
    teacher: TeacherShape
    hardware: Hardware
    num_ranks: int
    is_compiled: bool = False


def step_report(request: StepRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """The figures of every network, of the teacher and of a step, as plain data. ``say`` takes a line per network.

    Of a compiled step ``as_written`` has the same figures without the compiler.

    Raises:
        PlanError: the family does not go onto these ranks.
        SetupError: a compiled step is wanted, and there is no C++ compiler.
    """
    if not request.is_compiled:
        return _report(request, say, None)
    lacking = what_is_lacking("cpu")
    if lacking:
        raise SetupError(
            f"--compiled: {lacking}, and inductor asks it what this CPU has before it makes any code",
            fix="Install one, or count the step as written, without --compiled.",
        )
    written = _report(request, say, None)
    say("the same, compiled")
    return {**_report(request, say, Compiler()), "as_written": written}


def _report(
    request: StepRequest, say: Callable[[str], None], compiler: Compiler | None
) -> dict[str, Any]:
    recipe, hardware = request.recipe, request.hardware
    plan = plan_family(recipe, request.teacher, request.num_ranks, DEVICES[hardware.name])
    family, networks = FamilyWork(recipe, request.teacher), {}
    say("counting the teacher")
    teacher = _row(trace_teacher(family, compiler), hardware)
    for student, placement in zip(recipe.students, plan.placements, strict=True):
        images = placement.most_at_once
        say(f"counting {student.label}, {images} images at once")
        traced = trace_student(family, student, images, len(placement.slices), compiler)
        row, optimizer = _row(traced, hardware), traced.phases["optimizer"]
        row["phases"]["optimizer"] = _phase(optimizer, placement.largest_slice)
        seconds = optimizer.other_bytes / (hardware.other_tb_s * TERA)
        networks[student.label] = {**row, "optimizer_ms_per_step": seconds * 1e3}
    per_image = teacher["ms"] + sum(each["ms"] for each in networks.values())
    return {
        "networks": networks,
        "teacher": teacher,
        "ms_per_image": per_image,
        "teach_s": teacher["ms"] / 1e3,  # with image_s a file of --costs
        "image_s": {name: each["ms"] / 1e3 for name, each in networks.items()},
        "step": _step(plan, networks, teacher, per_image),
        "device": hardware.name,
        "assumptions": assumptions(hardware, is_compiled=compiler is not None),
    }


def assumptions(hardware: Hardware, *, is_compiled: bool) -> list[str]:
    """What the figures rest on, one sentence each."""
    rates = ", ".join(f"{hardware.rate(width):.0f} at width {width}" for width in RATES)
    how = "counted on the meta device by operators, eager"
    if is_compiled:
        how = "blocks by inductor's schedule for a CPU, loss and Sinkhorn in bf16 by kernels without logits (in fp32 chunks by inductor), the rest by operators, eager"
    return [
        f"Estimated: {how}; nothing ran on a GPU.",
        f"Products of {hardware.name} in TFLOP/s: {rates}.",
        f"Other kernels: {hardware.other_tb_s:.2f} TB/s; inputs and outputs of each go through memory.",
        f"The host takes {LAUNCH_S * 1e6:.0f} us a launch and {HOOK_S * 1e6:.0f} us a trained tensor and micro-batch.",
        "ms = max(matmul + other, host); of a student with Sinkhorn's bytes, without the optimizer, which is per step.",
        "The teacher's products are slower by the tiles and waves that its rows leave empty.",
        f"MFU: forward, loss and backward against {hardware.peak_tflops:.0f} TFLOP/s.",
    ]


def _row(traced: Traced, hardware: Hardware) -> dict[str, Any]:
    """The figures of one network."""
    counted, images = traced.per_micro_batch, traced.images
    extra = traced.phases.get("sinkhorn", Counts())
    work = Work(
        width=traced.width,
        images=images,
        launches=counted.launches,
        tflop=counted.flops / images / TERA,
        other_mb=counted.other_bytes / images / MB,
        tensors=traced.tensors,
        extra_mb=extra.other_bytes / images / MB,
        fill=traced.fill if traced.is_frozen else 1.0,
    )
    found = estimate(work, hardware)
    return {
        "micro_batch": images,
        "launches": counted.launches,
        "launches_per_image": counted.launches / images,
        "tflop": work.tflop,
        "matmul_mb": counted.matmul_bytes / images / MB,
        "other_mb": work.other_mb,
        "sinkhorn_mb": work.extra_mb,
        "matmul_ms": found.matmul_ms,
        "other_ms": found.other_ms,
        "host_ms": found.host_ms,
        "ms": found.ms,
        "bound": found.bound,
        "mfu": found.mfu,
        "parameters": traced.parameters,
        "tensors": traced.tensors,
        "phases": {name: _phase(phase, images) for name, phase in traced.phases.items()},
    }


def _phase(counted: Counts, images: int) -> dict[str, float]:
    """One phase: launches per micro-batch (of the optimizer, per step), the rest per image of ``images``."""
    return {
        "launches": counted.launches,
        "tflop": counted.flops / images / TERA,
        "matmul_mb": counted.matmul_bytes / images / MB,
        "other_mb": counted.other_bytes / images / MB,
    }


def _step(
    plan: Plan, networks: dict[str, dict[str, Any]], teacher: dict[str, Any], per_image: float
) -> dict[str, Any]:
    """A step on the plan's ranks: the rank that takes longest, perfect balance, and what the plan has."""
    loads_ms = [teacher["ms"] * share for share in plan.mean_shares]
    for placement in plan.placements:
        row = networks[placement.name]
        for rank, part in zip(placement.world_ranks, placement.slices, strict=True):
            loads_ms[rank] += row["ms"] * len(part) + row["optimizer_ms_per_step"]
    images, ranks = plan.images_global, plan.num_ranks
    return {
        "ranks": ranks,
        "batch": images,
        "ms": max(loads_ms),
        "ms_in_balance": per_image * images / ranks,
        "ms_planned": plan.step_s * 1e3,
        "slowest_rank": loads_ms.index(max(loads_ms)),
    }


def step_tables(report: dict[str, Any]) -> list[Table]:
    """The figures for people; of a compiled step those as written first."""
    if "as_written" not in report:
        return _tables(report, "estimated")
    return [*_tables(report["as_written"], "as written"), *_tables(report, "compiled")]


def _tables(report: dict[str, Any], what: str) -> list[Table]:
    rows = {"teacher": report["teacher"], **report["networks"]}
    table = Table(title=f"{what} for {report['device']}, per image", title_justify="left")
    names = "", "images at once", "launches", "an image", "TF", "matmul MB", "other MB", "ms"
    for name in (*names, "bound by", "MFU"):
        table.add_column(name, justify="left" if name in ("", "bound by") else "right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['micro_batch']}",
            f"{row['launches']:,}",
            f"{row['launches_per_image']:,.0f}",
            f"{row['tflop']:.3f}",
            f"{row['matmul_mb']:,.0f}",
            f"{row['other_mb']:,.0f}",
            f"{row['ms']:.2f}",
            row["bound"],
            f"{row['mfu']:.1%}",
        )
    table.add_row("sum", *[""] * 6, f"{report['ms_per_image']:.2f}", "", "")
    return [table, _phase_table(rows)]


def _phase_table(rows: dict[str, dict[str, Any]]) -> Table:
    title = "by phase: launches a micro-batch (of the optimizer a step) / TF / other MB an image"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    phases = ("forward", "heads", *PHASES[1:])
    for phase in phases:
        table.add_column(phase, justify="right")
    for name, row in rows.items():
        cells = []
        for phase in phases:
            found = row["phases"].get(phase)
            cells.append(
                ""
                if found is None
                else f"{found['launches']:,} / {found['tflop']:.3f} / {found['other_mb']:,.0f}"
            )
        table.add_row(name, *cells)
    return table


def step_lines(report: dict[str, Any]) -> list[str]:
    """What the tables do not say."""
    step = report["step"]
    written = report.get("as_written")
    compared = []
    if written is not None:
        compared.append(
            f"compiled {report['ms_per_image']:.2f} ms an image in place of {written['ms_per_image']:.2f} ms as written"
        )
    return [
        *compared,
        f"a step of {step['batch']:,} images on {step['ranks']} ranks: {step['ms']:,.0f} ms on rank {step['slowest_rank']}, "
        f"{step['ms_in_balance']:,.0f} ms in perfect balance; the plan has {step['ms_planned']:,.0f} ms",
        *report["assumptions"],
    ]
