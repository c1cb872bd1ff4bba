"""Which device a rank computes on."""

import os

import torch

from distill.errors import SetupError

# The number of a task on its node, by srun, Open MPI and MPICH
TASK_NUMBERS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
VISIBLE = "CUDA_VISIBLE_DEVICES"


def has_gpu(wanted: str) -> bool:
    """``engine.device`` of a recipe means a GPU on this machine."""
    return wanted != "cpu" and torch.cuda.is_available()


def take_device(wanted: str) -> torch.device:
    """This rank's device, the current one from now on.

    It is the GPU with the number ``LOCAL_RANK``, 0 where no launcher set that; or the only visible one of a
    rank that srun or mpirun started with one GPU per task.

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
    local_rank, num_gpus = _local_rank(), torch.cuda.device_count()
    if num_gpus == 1 and _is_task_with_gpu(local_rank):
        local_rank = 0
    if local_rank >= num_gpus:
        raise SetupError(
            f"engine.processes: rank {local_rank} of this machine has no GPU to itself, there are {num_gpus}",
            fix="Write `processes: auto` (one for each GPU; a rank can hold several students), or `device: cpu`.",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _local_rank() -> int:
    names = (name for name in ("LOCAL_RANK", *TASK_NUMBERS) if name in os.environ)
    return int(os.environ.get(next(names, ""), "0"))


def _is_task_with_gpu(local_rank: int) -> bool:
    """The launcher of tasks started this very rank and shows it one GPU; ranks started inside a task share what it has."""
    is_task = any(os.environ.get(name) == str(local_rank) for name in TASK_NUMBERS)
    return is_task and VISIBLE in os.environ and "," not in os.environ[VISIBLE]
