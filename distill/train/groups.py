"""Plan to process groups. The only file that creates one."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from distill.plan.plan import Plan


@dataclass(frozen=True)
class Groups:
    """The communicators of one process for one plan."""

    world_rank: int
    num_ranks: int
    exchange: dist.ProcessGroup
    control: dist.ProcessGroup
    alone: dist.ProcessGroup
    teacher: dist.ProcessGroup
    by_network: dict[str, dist.ProcessGroup]


def make_control(timeout: timedelta) -> dist.ProcessGroup:
    """A communicator of the world for a few numbers of the host: gloo on every device. Collective over the world."""
    return dist.new_group(timeout=timeout, backend="gloo")


def make_groups(plan: Plan, timeout: timedelta) -> Groups:
    """One communicator for the exchange, one for what ranks agree on, one for a sharded teacher, one per trained network, one per rank.

    Collective over the world. ``by_network`` holds only the networks this rank trains. Every network has a separate
    communicator, even where two share their ranks, so that their collectives can never meet.
    """
    world_rank, num_ranks = dist.get_rank(), dist.get_world_size()
    everyone = list(range(num_ranks))
    exchange, teacher = (dist.new_group(everyone, timeout=timeout) for _ in range(2))
    control = make_control(timeout)
    alone = [dist.new_group([rank], timeout=timeout) for rank in range(num_ranks)][world_rank]
    by_network = {}
    for placement in plan.placements:
        group = dist.new_group(list(placement.world_ranks), timeout=timeout)
        if world_rank in placement.world_ranks:
            by_network[placement.name] = group
    return Groups(world_rank, num_ranks, exchange, control, alone, teacher, by_network)
