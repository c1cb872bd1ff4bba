"""Which device a rank computes on."""

import os
import re
from pathlib import Path

import torch

from distill.errors import SetupError

# The number of a task on its node, by srun, Open MPI and MPICH
TASK_NUMBERS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
VISIBLE = "CUDA_VISIBLE_DEVICES"
DRIVER_FILE = Path("/proc/driver/nvidia/version")
DEVICES_FOLDER = Path("/dev")  # has nvidia0, nvidia1, ... where GPUs are handed to this process
CUBLAS_WORKSPACE = (
    ":4096:8"  # eight buffers of 4 MiB, one of the two settings with one order of adding up
)
NO_GPU = ("", "-1")  # values of CUDA_VISIBLE_DEVICES that hide all GPUs


def has_gpu(wanted: str) -> bool:
    """``engine.device`` of a recipe means a GPU on this machine.

    Raises:
        SetupError: the driver has a GPU that torch cannot use; training would fall back to the CPU in silence.
    """
    if wanted == "cpu":
        return False
    if torch.cuda.is_available():
        return True
    if (driver := unusable_driver()) is not None:
        raise SetupError(
            f"engine.device = {wanted}: the NVIDIA driver {driver} has a GPU, and torch {torch.__version__} ({_cuda_of_torch()}) cannot use it",
            fix="Install a driver for this torch's CUDA or a torch for this driver, or write `device: cpu`.",
        )
    return False


def unusable_driver() -> str | None:
    """Returns the version of a driver whose GPUs torch does not see; None where there is none, or GPUs are hidden on purpose."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in NO_GPU
    if is_hidden or not DRIVER_FILE.is_file() or not any(DEVICES_FOLDER.glob("nvidia[0-9]*")):
        return None
    found = re.search(r"\s(\d+\.[\d.]+)\s", DRIVER_FILE.read_text())
    return found[1] if found else "of an unknown version"


def _cuda_of_torch() -> str:
    return "built without CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def require_device(wanted: str, num_ranks: int = 1) -> bool:
    """Whether ``num_ranks`` ranks of this machine compute on a GPU each; all on the CPU otherwise.

    Raises:
        SetupError: a GPU is wanted where there is none, or torch cannot use it, or there are more ranks than there are GPUs.
    """
    is_on_gpu = has_gpu(wanted)
    if wanted == "cuda" and not is_on_gpu:
        raise SetupError(
            "engine.device = cuda: no CUDA device on this machine",
            fix="Write `device: auto` or `device: cpu`.",
        )
    if is_on_gpu and num_ranks > torch.cuda.device_count():
        raise SetupError(
            f"engine.processes: rank {num_ranks - 1} of this machine has no GPU to itself, there are {torch.cuda.device_count()}",
            fix="Write `processes: auto` (one for each GPU; a rank can hold several students), or `device: cpu`.",
        )
    return is_on_gpu


def take_device(wanted: str, *, is_deterministic: bool = False) -> torch.device:
    """This rank's device, the current one from now on; a GPU with the same bits every time if ``is_deterministic``.

    It is the GPU with the number ``LOCAL_RANK``, 0 where no launcher set that; or the only visible one of a
    rank that srun or mpirun started with one GPU per task.

    Raises:
        SetupError: a GPU is wanted where there is none, or torch cannot use it, or there are more ranks than there are GPUs.
    """
    local_rank = _local_rank()
    if has_gpu(wanted) and torch.cuda.device_count() == 1 and _is_task_with_gpu(local_rank):
        local_rank = 0
    if not require_device(wanted, local_rank + 1):
        return torch.device("cpu")
    if is_deterministic:
        _switch_to_deterministic()
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def cores_of_rank() -> int:
    """This rank's part of the cores, which the ranks of a node share evenly: one at least."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _switch_to_deterministic() -> None:
    """Operators of a GPU give the same bits every time or raise; before CUDA starts, since cuBLAS reads its variable once.

    The one switch of torch reaches attention (one split of the keys in the backward pass, never cuDNN's), indices that
    add up, and resizing with a gradient (by indices).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)  # no mere warning: attention would keep its fast way
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def _local_rank() -> int:
    names = (name for name in ("LOCAL_RANK", *TASK_NUMBERS) if name in os.environ)
    return int(os.environ.get(next(names, ""), "0"))


def _is_task_with_gpu(local_rank: int) -> bool:
    """The launcher of tasks started this very rank and shows it one GPU; ranks started inside a task share what it has."""
    is_task = any(os.environ.get(name) == str(local_rank) for name in TASK_NUMBERS)
    return is_task and VISIBLE in os.environ and "," not in os.environ[VISIBLE]
