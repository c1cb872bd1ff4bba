"""Which device a rank computes on."""

import os

import torch

from distill.errors import SetupError


def has_gpu(wanted: str) -> bool:
    """``engine.device`` of a recipe means a GPU on this machine."""
    return wanted != "cpu" and torch.cuda.is_available()


def take_device(wanted: str) -> torch.device:
    """This rank's device, the current one from now on; a launcher has set ``LOCAL_RANK``.

    Raises:
        SetupError: a GPU is wanted where there is none, or more ranks than there are GPUs.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SetupError(
            "engine.device = cuda: no CUDA device on this machine",
            fix="Write `device: auto` or `device: cpu`.",
        )
    if not has_gpu(wanted):
        return torch.device("cpu")
    local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise SetupError(
            f"engine.processes: rank {local_rank} of this machine has no GPU to itself, there are {num_gpus}",
            fix="Write `processes: auto` (one for each GPU; a rank can hold several students), or `device: cpu`.",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
