"""Batches that reach the device as the loader's do: page-locked, copied while other work is queued, dropped at once."""

import torch

from tests.gpu.clock import Figures, measure_s
from tests.gpu.sizes import Sizes

ROUNDS = 32
MIB = 2**20


def of_batches(device: torch.device, sizes: Sizes) -> Figures:
    """Copies of which every byte is compared, behind matrix products that make them late, and their rate."""
    side = sizes.matmul_side
    factor = torch.ones(side, side, device=device)
    batches = []
    for value in range(ROUNDS):
        factor = (factor @ factor).clamp(max=1.0)
        batches.append(_page_locked(device, value).to(device, non_blocking=True))
    wrong = sum(not bool((batch == value).all()) for value, batch in enumerate(batches))
    host = _page_locked(device, 1)
    seconds = measure_s(device, lambda: host.to(device, copy=True), sizes.repeats)
    figures: Figures = {
        "copies": ROUNDS,
        "wrong": wrong,
        "gb_s": round(16 * MIB / seconds / 1e9, 1),
    }
    if wrong:
        figures["problems"] = [
            f"{wrong} of {ROUNDS} batches were written over before they were copied"
        ]
    return figures


def _page_locked(device: torch.device, value: int) -> torch.Tensor:
    """A batch of 16 MiB; a CPU has no page-locked memory to copy from."""
    batch = torch.full((16, MIB), value, dtype=torch.uint8)
    return batch.pin_memory() if device.type == "cuda" else batch
