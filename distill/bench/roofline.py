"""From counts to milliseconds: the time that a GPU takes at least for some work, by fixed rates.

    matmul = TFLOP / rate of the network's width        (a frozen teacher: with tiles and waves that are not full)
    other  = bytes outside matrix products / bandwidth  (a student: with Sinkhorn's)
    host   = launches * 6 us + tensors * 80 us of DeepSpeed's hooks
    ms     = max(matmul + other, host)

The rates are an H100's; other GPUs have them in the ratio of their data sheets. They are not measured, and they do
not change: figures of two commits are compared by them.
"""

from dataclasses import dataclass

import numpy as np

from distill.errors import PlanError

LAUNCH_S = 6e-6  # the host starts a kernel
HOOK_S = 80e-6  # DeepSpeed's hook on the gradient of one tensor
# TFLOP/s of bf16 products by a network's width; straight lines between, flat beyond
RATES = {384: 450.0, 768: 600.0, 1024: 650.0, 1280: 680.0, 4096: 740.0}


@dataclass(frozen=True)
class Hardware:
    """A GPU. ``peak_tflops``: of dense bf16 products, from its data sheet; ``other_tb_s``: what kernels outside products reach."""

    name: str
    peak_tflops: float
    other_tb_s: float

    def rate(self, width: int) -> float:
        """TFLOP/s of products at a width."""
        scale = self.peak_tflops / HARDWARE["h100"].peak_tflops
        return float(np.interp(width, list(RATES), list(RATES.values()))) * scale


HARDWARE = {
    each.name: each
    for each in (
        Hardware("h100", 989.0, 2.8),
        Hardware("h200", 989.0, 2.8 * 4.8 / 3.35),  # memory of 4.8 TB/s in place of 3.35
        Hardware("a100", 312.0, 2.8 * 2.04 / 3.35),  # of 2.04
    )
}


def find_hardware(name: str) -> Hardware:
    """A GPU by its name.

    Raises:
        PlanError: no rates are known for it.
    """
    if name not in HARDWARE:
        known = ", ".join(HARDWARE)
        raise PlanError(f"--device {name}: no rates are known", fix=f"Choose one of {known}.")
    return HARDWARE[name]


@dataclass(frozen=True)
class Work:
    """What one network does. ``launches`` are per micro-batch of ``images``, the rest per image.

    ``fill``: the part of its tiles' work that its products do; 1 where the rate has it. ``tensors``:
    whose gradients DeepSpeed's hooks take; none of a teacher. ``extra_mb``: of Sinkhorn.
    """

    width: int
    images: int
    launches: int
    tflop: float
    other_mb: float
    tensors: int = 0
    extra_mb: float = 0.0
    fill: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """Milliseconds of an image, and the part of the peak that its FLOPs reach."""

    matmul_ms: float
    other_ms: float
    host_ms: float
    mfu: float

    @property
    def ms(self) -> float:
        """The larger of what the device and the host take."""
        return max(self.matmul_ms + self.other_ms, self.host_ms)

    @property
    def bound(self) -> str:
        """What takes longest."""
        if self.host_ms > self.matmul_ms + self.other_ms:
            return "host"
        return "matmul" if self.matmul_ms > self.other_ms else "memory"


def estimate(work: Work, hardware: Hardware) -> Estimate:
    """The formula of this module."""
    matmul_ms = work.tflop / work.fill / hardware.rate(work.width) * 1e3
    other_ms = (work.other_mb + work.extra_mb) * 1e6 / (hardware.other_tb_s * 1e12) * 1e3
    host_ms = (work.launches * LAUNCH_S + work.tensors * HOOK_S) / work.images * 1e3
    longest = max(matmul_ms + other_ms, host_ms)
    return Estimate(matmul_ms, other_ms, host_ms, work.tflop / longest * 1e3 / hardware.peak_tflops)
