"""Students on ranks by what they really cost: the seconds that an earlier start of the run measured, where they shorten a step.

    costs.json    seconds per image of the teacher and of each student, written once by the first steps of a run

With ``engine.placed_by: measured``. A network on another number of ranks adds its gradients in another order.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from distill.plan.costs import Costs, costs_of
from distill.plan.flops import Device
from distill.plan.from_recipe import TeacherShape, family_footprint, plan_family
from distill.plan.plan import Plan, rebalanced, timed_by
from distill.recipe.keys import FamilyRecipe
from distill.runfolder.status import write_json

FILE = "costs.json"
WORTH = 0.05  # students stay where their FLOPs place them when a step would become shorter by less


def write_costs(run_folder: Path, world_rank: int, costs: Costs) -> None:
    """Hands what was measured, the same on every rank, to the next start; rank 0 writes, if there is room."""
    if world_rank:
        return
    with suppress(OSError):
        write_json(run_folder / FILE, {"teach_s": costs.teach_s, "image_s": dict(costs.image_s)})


def agreed_costs(
    run_folder: Path, labels: Sequence[str], control: dist.ProcessGroup
) -> Costs | None:
    """What rank 0 finds in the run folder, the same on every rank; None where some student has no seconds.

    Communication: one broadcast of a number per network over ``control``, a gloo group of the world.
    """
    seconds = torch.zeros(1 + len(labels), dtype=torch.float64)
    if dist.get_rank() == 0:
        found = None
        with suppress(OSError, ValueError):  # not measured yet, or by a disk that was full
            found = costs_of(json.loads((run_folder / FILE).read_text(encoding="utf-8")), FILE)
        if found is not None and set(labels) <= set(found.image_s):
            values = [found.teach_s, *(found.image_s[label] for label in labels)]
            seconds = torch.tensor(values, dtype=torch.float64)
    dist.broadcast(seconds, src=0, group=control)
    teach_s, *image_s = seconds.tolist()
    return Costs(teach_s, dict(zip(labels, image_s, strict=True)), FILE) if teach_s else None


def place_family(
    recipe: FamilyRecipe, shape: TeacherShape, num_ranks: int, device: Device, costs: Costs | None
) -> tuple[Plan, Device, str]:
    """A plan, what it was made for, and words where it is not by FLOPs: it is by ``costs`` where a step becomes shorter by ``WORTH`` and every rank's memory holds it."""
    by_flops = plan_family(recipe, shape, num_ranks, device)
    if costs is None:
        return by_flops, device, ""
    timed_device = replace(device, costs=costs)
    measured = plan_family(recipe, shape, num_ranks, timed_device)
    image_s = [costs.image_s[placement.name] for placement in by_flops.placements]
    timed = timed_by(by_flops, costs.teach_s, image_s)
    balanced = rebalanced(timed, [costs.teach_s] * num_ranks, timed.student_s)
    memory = family_footprint(recipe, shape, measured).fullest.total
    if measured.step_s > balanced.step_s * (1.0 - WORTH) or memory > device.memory_gib:
        return by_flops, device, ""
    counts = [
        f"{after.name} {len(after.slices)} ({len(before.slices)} by FLOPs)"
        for before, after in zip(by_flops.placements, measured.placements, strict=True)
    ]
    shorter = 1.0 - measured.step_s / balanced.step_s
    text = f"ranks by the seconds that this run measured: {', '.join(counts)}; a step {shorter:.0%} shorter"
    return measured, timed_device, text
