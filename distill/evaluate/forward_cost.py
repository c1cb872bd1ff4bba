"""Time and memory of the patch features of one picture, before they are computed.

time     operations of the forward passes (``distill.plan.flops``) over the rate of this network here, which is
timed on a smaller picture; of a network whose operations are not known, two timed pictures
memory   of the forward pass in fp32 with attention that holds no matrix of all pairs, and of what is made of it
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from distill.evaluate.cost import Timed
from distill.plan.flops import backbone_tflops
from distill.protocols.images import scoring_dtype
from students.shapes import BackboneSpec

TIMED_SIDES = (512, 384, 256, 128, 64)  # pixels; the largest that costs at most MOST_TIMED_TFLOP
MOST_TIMED_TFLOP = 0.03
OUTSIDE_SIDES = (224, 448)
OUTSIDE_BYTES = 64  # a guess of the memory of one token and channel of a network from outside
BYTES_FP32 = 4
CGROUP = Path("/sys/fs/cgroup")
Hw = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class ForwardCost:
    """Of the forward passes that one picture takes. ``tflop`` is None where it is not known."""

    tflop: float | None
    seconds: float
    num_bytes: float


class CostModel:
    """Estimates what pictures cost one network on its device; making it times a few forward passes."""

    def __init__(
        self,
        backbone: nn.Module,
        spec: BackboneSpec | None,
        largest_px: int,
        device: torch.device,
    ) -> None:
        """``spec``: of a network whose shape is known. ``largest_px``: nothing larger is timed."""
        self._spec = None if spec is None or spec.probe_call else spec
        self._width, self._stride = int(backbone.width), int(backbone.stride)  # type: ignore[arg-type]
        parameters = sum(each.numel() for each in backbone.parameters())
        self._weights = BYTES_FP32 * parameters
        timed = Timed(backbone, device, scoring_dtype(parameters, device))
        if self._spec is None:
            self._seconds = self._of_two(timed, largest_px)
        else:
            self._seconds = self._of_rate(timed, self._spec, largest_px)

    def of(self, shapes: Sequence[Hw]) -> ForwardCost:
        """What forward passes on one picture, or on tiles of it, cost."""
        largest = max(shapes, key=lambda hw: hw[0] * hw[1])
        tflop = None
        if self._spec is not None:
            tflop = sum(backbone_tflops(self._spec, square_px(hw)) for hw in shapes)
            inside = self._spec.forward_bytes(square_px(largest))
        else:
            inside = OUTSIDE_BYTES * self._width * self._patches(largest)
        return ForwardCost(tflop, sum(map(self._seconds, shapes)), self._weights + inside)

    def _patches(self, hw: Hw) -> float:
        return hw[0] * hw[1] / self._stride**2

    def _of_rate(self, timed: Timed, spec: BackboneSpec, largest_px: int) -> Callable[[Hw], float]:
        sides = [self._side(each, largest_px) for each in TIMED_SIDES]
        cheap = (each for each in sides if backbone_tflops(spec, each) <= MOST_TIMED_TFLOP)
        side = next(cheap, sides[-1])
        rate = backbone_tflops(spec, side) / timed(torch.rand(1, 3, side, side))
        return lambda hw: backbone_tflops(spec, square_px(hw)) / rate

    def _of_two(self, timed: Timed, largest_px: int) -> Callable[[Hw], float]:
        """Seconds as a multiple of the patches and a multiple of their square, neither below 0."""
        first, second = (self._side(each, largest_px) for each in OUTSIDE_SIDES)
        first_s = timed(torch.rand(1, 3, first, first))
        if first == second:
            return lambda hw: first_s * hw[0] * hw[1] / first**2
        second_s = timed(torch.rand(1, 3, second, second))
        few, many = self._patches((first, first)), self._patches((second, second))
        square = (second_s / many - first_s / few) / (many - few)
        square = min(max(0.0, square), second_s / many**2)
        line = second_s / many - square * many
        return lambda hw: self._patches(hw) * (line + square * self._patches(hw))

    def _side(self, wanted_px: int, largest_px: int) -> int:
        return max(1, min(wanted_px, largest_px) // self._stride) * self._stride


def square_px(hw: Hw) -> int:
    """The side of a square picture with as many pixels."""
    return round(math.sqrt(hw[0] * hw[1]))


def available_bytes(device: torch.device) -> int:
    """Memory that is free on a device; of the host what a container still has, if it has less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = (_number(CGROUP / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, limit - used)


def _number(path: Path) -> int | None:
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None
