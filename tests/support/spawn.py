"""Runs a function on several processes, of gloo unless a GPU is asked for, and brings back what each returned.

Ranks on a CPU are forked from a server that has imported everything once (``tests.support.preload``): a third of the time of
processes that start from nothing. Ranks on a GPU start from nothing: CUDA cannot be forked.
"""

import os
import pickle
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import chdir
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def on_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = TIMEOUT_S,
    device_type: str = "cpu",
) -> list[Any]:
    """``function(*args)`` on every rank of a fresh world; results in rank order, the first error raised here."""
    with tempfile.TemporaryDirectory() as folder:
        context = context_for(device_type)
        workers = [
            context.Process(
                target=_work, args=(rank, num_ranks, folder, function, args, device_type)
            )
            for rank in range(num_ranks)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout_s)
        hung = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
        for worker in workers:
            worker.kill()
            worker.join()
        errors = sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            raise AssertionError(f"{errors[0].name}:\n{errors[0].read_text()}")
        assert not hung, f"ranks {hung} did not end within {timeout_s} s"
        assert all(worker.exitcode == 0 for worker in workers), [
            worker.exitcode for worker in workers
        ]
        return [
            pickle.loads((Path(folder) / f"result-{rank}").read_bytes())
            for rank in range(num_ranks)
        ]  # our own bytes


def context_for(device_type: str) -> Any:
    """How a rank starts. The server starts here, once, in the folder that it finds ``tests`` in, wherever a test stands."""
    if device_type != "cpu":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    os.environ.update(ONE_THREAD)
    with chdir(ROOT):
        forkserver.ensure_running()
    return context


def _work(
    rank: int,
    num_ranks: int,
    folder: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    device_type: str,
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank), DS_ACCELERATOR=device_type
    )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the next line but two
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # what nobody wrote to is NaN
    try:
        assert device_type != "cpu" or "tests.support.preload" in sys.modules, "another fork server"
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=60),
        )
        result = function(*args)
        (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        raise
