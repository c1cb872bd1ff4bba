"""Seconds of compute on a device, without waiting for it.

On a GPU the clock runs on the device: spans are marked by events and added up when somebody reads,
which is at the logging interval, where the device is waited for anyway.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up spans of one kind of work, and how many units were done in them."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._total_s = 0.0
        self.units = 0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, units: int = 1) -> Iterator[None]:
        """Counts what is started inside, as so many units."""
        self.units += units
        if self._is_cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            stop.record()
            self._spans.append((start, stop))
        else:
            started = time.perf_counter()
            yield
            self._total_s += time.perf_counter() - started

    def read_s(self) -> float:
        """Seconds so far. On a GPU, waits for the last span."""
        for start, stop in self._spans:
            stop.synchronize()
            self._total_s += start.elapsed_time(stop) / 1e3
        self._spans = []
        return self._total_s
