"""The clock of a device: what it counts, what it leaves out, and that reading it waits for nothing."""

import time

import torch

from distill.train.student import Stopwatch
from teacher.peers import waiting_for_peers
from tests.gpu.clock import Figures, synchronize
from tests.gpu.sizes import Sizes

PRODUCTS = 64


def stopwatch(device: torch.device, sizes: Sizes) -> Figures:
    """Milliseconds of matrix products, of as many behind a mark of a wait, and of the reading between."""
    factor = torch.ones(sizes.matmul_side, sizes.matmul_side, device=device)

    def work() -> None:
        for _ in range(PRODUCTS):
            factor @ factor

    alone, beside = Stopwatch(device), Stopwatch(device)
    work()
    synchronize(device)
    with alone.running():
        work()
    with beside.running():
        work()
        with waiting_for_peers(device):
            work()
    began = time.perf_counter()
    early_s = beside.read_s()
    read_s = time.perf_counter() - began
    synchronize(device)
    figures: Figures = {"alone_ms": 1e3 * alone.read_s(), "beside_ms": 1e3 * beside.read_s()}
    figures["read_us"] = 1e6 * read_s
    if device.type == "cuda":
        figures["problems"] = [
            *(["reading waited for the device"] if early_s else []),
            *(["a wait counts"] if beside.read_s() > 1.5 * alone.read_s() else []),
        ]
    return figures
