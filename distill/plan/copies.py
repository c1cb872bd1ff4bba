"""What copies of the state take: memory of a node (``checkpoint.peer``), the time of a save. Imports no torch."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from distill.engine.node_memory import PREFIX, memory_folder
from distill.plan.job import JobPlan
from distill.plan.memory import GIB, Footprint
from distill.plan.plan import Plan
from distill.recipe.keys import Recipe

NUM_COPIES = 2  # of which one is complete at any time
COPY_GB_PER_S, DISK_GB_PER_S = (
    6.8,
    1.0,
)  # into host memory; to a shared disk, verified (docs/planning.md)
STEPS_TO_STOP = 2  # at most, from SIGTERM to the save


def largest_state_gb(plan: Plan, footprint: Footprint) -> float:
    """What the rank that gathers most has to copy: master weights, moments and average of the largest network.

    Of a rank that holds several networks all are counted.
    """
    state = [each.optimizer + each.ema for each in footprint.memory]
    return (
        max(sum(state[rank] for rank in each.world_ranks) for each in plan.placements) * GIB / 1e9
    )


def late_stop(job: JobPlan, step_s: float, grace: int | None) -> str | None:
    """A line where a part of the job cannot stop and save within ``checkpoint.grace``; None where it can, or there is none."""
    size = largest_state_gb(job.plan, job.footprint)
    save_s = size / COPY_GB_PER_S + size / DISK_GB_PER_S
    takes_s = STEPS_TO_STOP * step_s + save_s
    if grace is None or takes_s <= grace:
        return None
    return (
        f"checkpoint.grace = {grace}: {job.name} takes about {takes_s:.0f} s to stop, two steps of {step_s:.3g} s and a "
        f"save of {size:.2g} GB at {DISK_GB_PER_S:g} GB/s; what is killed before goes on from the checkpoint before it"
    )


def copies_gib(plans: Sequence[JobPlan], num_nodes: int) -> float:
    """GiB of each node: two copies of the largest phase's weights, moments and EMAs, each on two nodes if there are several."""
    states = [sum(m.optimizer + m.ema for m in job.footprint.memory) for job in plans]
    return NUM_COPIES * max(states, default=0.0) * min(num_nodes, 2) / num_nodes


def lacking_memory(
    recipe: Recipe, plans: Sequence[JobPlan], num_ranks: int, ranks_per_node: int | None
) -> list[str]:
    """A line where this node has not the memory for copies; nothing where it has, or none are wanted."""
    if not recipe.checkpoint.peer:
        return []
    num_nodes = -(-num_ranks // (recipe.engine.ranks_per_node or ranks_per_node or num_ranks))
    wanted, free = copies_gib(plans, num_nodes), _free_gib(memory_folder())
    if wanted <= free:
        return []
    size = f"{wanted * 1.1:.0f}g" if wanted > 1 else f"{wanted * 1100:.0f}m"
    return [
        f"checkpoint.peer: the copies take {wanted:.2g} GiB of {memory_folder()} on a node, {free:.2g} are free here, "
        f"where copies end when it is full; docker gives more by --shm-size={size}"
    ]


def _free_gib(folder: Path) -> float:
    """What is free, or held by copies, which are written over."""
    with suppress(OSError):
        held = sum(
            path.stat().st_size
            for path in folder.glob(f"{PREFIX}{os.getuid()}-*/*/*/*")
            if path.is_file()
        )
        return (shutil.disk_usage(folder).free + held) / 2**30
    return 0.0
