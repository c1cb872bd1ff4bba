"""Seconds and memory of work on a device; a CPU has a clock and no memory to count."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Figures = dict[str, Any]  # plain data; "problems", where it is not empty, makes the check fail
NO_MEMORY = "no device memory on a CPU"


class NotHereError(Exception):
    """A check that this machine cannot make; the message is the reason."""


def synchronize(device: torch.device) -> None:
    """Waits for all work of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Frees what nothing refers to any more, and counts peak memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure_s(device: torch.device, work: Callable[[], object], repeats: int) -> float:
    """Median seconds of ``work``, after one call that is not counted: CUDA events, on a CPU the clock."""
    work()
    synchronize(device)
    return statistics.median(_once_s(device, work) for _ in range(repeats))


def _once_s(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak_gib(device: torch.device) -> float | None:
    """Most memory that tensors took at once since ``release``; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30


def shown_gib(value: float | None) -> float | str:
    """GiB as a figure."""
    return NO_MEMORY if value is None else round(value, 3)


def is_out_of_memory(error: BaseException) -> bool:
    """The device has no room; a CPU has no error of its own for it."""
    return isinstance(error, torch.OutOfMemoryError)


def reason_of(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:300]}"
