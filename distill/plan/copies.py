"""Memory that copies of the state take on a node (``checkpoint.peer``), and whether this one has it. Imports no torch."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from distill.engine.node_memory import PREFIX, memory_folder
from distill.plan.job import JobPlan
from distill.recipe.keys import Recipe

NUM_COPIES = 2  # of which one is complete at any time


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
