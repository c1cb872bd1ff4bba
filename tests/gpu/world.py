"""A world of one rank in this process, made once and left at the end."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(minutes=5)


def join_world(device: torch.device) -> None:
    """Starts the process group of one rank and prepares DeepSpeed, unless that was done."""
    from torch._C._distributed_c10d import HashStore

    from distill.engine.engine import prepare_deepspeed

    if dist.is_initialized():
        return
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    prepare_deepspeed(device.type)


def leave_world() -> None:
    """Ends the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
