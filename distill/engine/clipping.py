"""Norms of gradients that are sharded over a group, and what clipping makes of them.

A network is clipped by one norm, or its backbone and each of its heads by itself: parameter groups then hold
parameters of one of these only, and AdamW gets the factor of the group that it is about to step.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from teacher.peers import waiting_for_peers

CLIP_EPS = 1e-6  # as torch and DeepSpeed have it
CLIPPED_AS = "clipped_as"  # of a parameter group: the part of the network that it is clipped with
NETWORK = ""  # all of it


def part_of(parameter: str, clip_by: str) -> str:
    """Returns the part of a task that a parameter is clipped with: its top module (``backbone``, ``dino_head``), or all."""
    return parameter.partition(".")[0] if clip_by == "module" else NETWORK


@torch.no_grad()
def squared_norms(
    gradients: Mapping[str, Sequence[Tensor]], group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """Squared norm of each part's gradients over all ranks, float64. One all-reduce of a number for each part; the parts are those of every rank."""
    squares = torch.stack(
        [
            torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in each])
            .square()
            .sum()
            for each in gradients.values()
        ]
    )
    if dist.get_world_size(group) > 1:
        with waiting_for_peers(squares.device):
            dist.all_reduce(squares, group=group)
    return dict(zip(gradients, squares.unbind(), strict=True))


def divisors(squares: Mapping[str, Tensor], largest: float) -> dict[str, Tensor]:
    """What each part's gradients are divided by so that no norm is above ``largest``."""
    return {
        part: ((square.sqrt().float() + CLIP_EPS) / largest).clamp(min=1.0)
        for part, square in squares.items()
    }


def gradients_of(zero: Any, groups: Sequence[Mapping[str, Any]]) -> dict[str, list[Tensor]]:
    """This rank's parts of the averaged gradients of a DeepSpeed optimizer, by the part of the network."""
    found: dict[str, list[Tensor]] = {each[CLIPPED_AS]: [] for each in groups}
    for index, gradients in zero.averaged_gradients.items():
        found[groups[index][CLIPPED_AS]] += gradients
    return found
