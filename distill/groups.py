"""Plan to process groups. The only file that creates one."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from distill.plan import Plan


@dataclass(frozen=True)
class Groups:
    """The communicators of one process for one plan."""

    world_rank: int
    num_ranks: int
    exchange: dist.ProcessGroup
    control: dist.ProcessGroup
    alone: dist.ProcessGroup
    by_network: dict[str, dist.ProcessGroup]


def make_groups(plan: Plan, timeout: timedelta) -> Groups:
    """One communicator for the exchange, one for what ranks agree on, one per trained network, one per rank.

    Collective over the world. ``by_network`` holds only the networks this rank trains. Every network has a communicator of its
    own, even where two share their ranks, so that their collectives can never meet.
    """
    world_rank, num_ranks = dist.get_rank(), dist.get_world_size()
    exchange, control = (dist.new_group(list(range(num_ranks)), timeout=timeout) for _ in range(2))
    alone = [dist.new_group([rank], timeout=timeout) for rank in range(num_ranks)][world_rank]
    by_network = {}
    for placement in plan.placements:
        group = dist.new_group(list(placement.world_ranks), timeout=timeout)
        if world_rank in placement.world_ranks:
            by_network[placement.name] = group
    return Groups(world_rank, num_ranks, exchange, control, alone, by_network)
