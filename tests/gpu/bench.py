"""The benchmark on one rank in this process: steps of a small family, waits for the device, memory against the plan."""

import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tests.gpu.clock import NO_MEMORY, Figures, peak_gib, release
from tests.gpu.sizes import Sizes
from tests.gpu.world import join_world

if TYPE_CHECKING:
    from distill.bench.measure import Bench

WARMUP_STEPS = 3
ABOVE_PLAN = 1.1  # measured over planned, from which on a plan is too low
WAIT = "synchronizing CUDA operation"


def build_bench(
    device: torch.device, folder: Path, *, recipe: str = "", overrides: tuple[str, ...] = ()
) -> "Bench":
    """The benchmark of a recipe on one rank; of two tiny students where none is given."""
    from distill.bench.measure import Bench, Request, family_of
    from tests.support.jobs import HEADS, TINY

    if not recipe:
        path = folder / "tiny.yaml"
        path.write_text(TINY.replace("HEADS", HEADS))
        recipe = str(path)
    words = ("engine.processes=1", f"engine.device={device.type}", *overrides)
    request = Request(recipe, words, (), 1, 10, WARMUP_STEPS, None, None, 1.0)
    return Bench(request, *family_of(request), device)


def steps(device: torch.device, sizes: Sizes) -> Figures:
    """Seconds of a step of a small family, and who waited for the device how often between two readings of the clocks."""
    from distill.bench.report import OURS

    join_world(device)
    recipe = "" if sizes.bench_is_tiny else "bench_cpu"
    overrides = (
        ("schedule.batch=2",)
        if sizes.bench_is_tiny
        else ("engine.precision=bf16", "engine.teacher_micro_batch=16")
    )
    with tempfile.TemporaryDirectory() as scratch:
        bench = build_bench(device, Path(scratch), recipe=recipe, overrides=overrides)
        bench.warm_up(OURS)
        with counted_waits(device) as waits:
            bench.warm_up(OURS)
        turn = bench.turn(OURS)
    first, last = turn.first, turn.last
    batch = bench.modes[OURS].schedule.batch
    step_s = (last.time_s - first.time_s) / turn.num_steps
    return {
        "step_ms": 1e3 * step_s,
        "images_per_s": batch / step_s,
        "teaching_ms": 1e3 * (last.teaching_s - first.teaching_s) / turn.num_steps,
        "training_ms": 1e3 * (last.training_s - first.training_s) / turn.num_steps,
        "waits": dict(waits),
        "problems": [f"{count} waits in {place}" for place, count in waits.items()],
    }


@contextmanager
def counted_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Counts warnings of torch about waits for the device, by file; none on a CPU."""
    waits = Counter[str]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    for each in caught:
        if WAIT in str(each.message):
            waits["/".join(Path(each.filename).parts[-3:])] += 1


def memory(device: torch.device, sizes: Sizes) -> Figures:
    """Most memory of a rank with a teacher and one student, beside the plan's without the context."""
    from distill.bench.report import OURS
    from distill.plan.from_recipe import family_footprint, plan_family

    join_world(device)
    figures: Figures = {"problems": []}
    for name, images in sizes.memory.items():
        release(device)
        words = (*sizes.memory_overrides, f"schedule.batch={images}", "engine.balance=0")
        is_full = name != "tiny"
        words += (f"students=[{name}]", f"engine.micro_batch={images}") if is_full else ()
        with tempfile.TemporaryDirectory() as scratch:
            recipe = "family_vit" if is_full else ""
            bench = build_bench(device, Path(scratch), recipe=recipe, overrides=words)
            bench.warm_up(OURS)
        family, measured = bench.modes[OURS], peak_gib(device)
        plan = plan_family(family, bench.shape, 1)
        parts = family_footprint(family, bench.shape, plan).fullest
        planned = parts.total - parts.context
        figures[name] = {"images": images, "planned_gib": round(planned, 3)}
        del bench
        if measured is None:
            figures[name]["measured"] = NO_MEMORY
            continue
        figures[name] |= {"measured_gib": round(measured, 3), "ratio": measured / planned}
        if measured > ABOVE_PLAN * planned:
            figures["problems"].append(f"{name}: {measured:.1f} GiB, planned {planned:.1f}")
    return figures
