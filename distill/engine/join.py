"""How a rank joins the others: by a store that its launcher gave it."""

import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]  # public, not listed

MeetingPlace = (
    str | Store
)  # a path inside a folder of this launch alone, or a store of this launch alone


def join_ranks(device_type: str, timeout: timedelta, store: MeetingPlace) -> None:
    """Makes the process group of all ranks, which then is torch's default.

    Args:
        device_type: where the ranks compute.
        timeout: of every collective.
        store: where the ranks find each other.
    """
    backend = "nccl" if device_type == "cuda" else "gloo"
    world_rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if isinstance(store, str):
        store = FileStore(store, num_ranks)
    store.set_timeout(timeout)
    dist.init_process_group(
        backend, timeout=timeout, store=store, rank=world_rank, world_size=num_ranks
    )
