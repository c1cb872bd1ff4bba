"""What a step costs: floating-point operations per network and phase, from shapes alone.

A multiply-add counts as two. Only matrix products and convolutions are counted; they are over 95%
of the work of every network here. Training costs three forward passes. The plan uses ratios of
these numbers; measured times may replace them.
"""

import os
import time
from dataclasses import dataclass, replace

from distill.errors import PlanError
from distill.plan.costs import Costs
from students.shapes import BackboneSpec
from teacher.shapes import HeadShape, scaled_size

TRAINING_FACTOR = 3.0  # forward, gradient of the inputs, gradient of the weights
# Products with the prototypes that the method needs: the student's logits and their two gradients, and
# the teacher's logits once per Sinkhorn iteration. Walking over them in chunks, which saves the memory
# of all logits, repeats four.
PROTOTYPE_PASSES = 3.0
SINKHORN_PASSES = 3.0


@dataclass(frozen=True)
class Device:
    """What a plan assumes of one device. ``tflops_per_s`` is the peak of dense bf16 products, ``efficiency`` the part of it that training reaches.

    ``costs``: what a family's networks were measured to take, which then comes before what their FLOPs give.
    """

    name: str
    tflops_per_s: float
    memory_gib: float
    efficiency: float
    costs: Costs | None = None

    def seconds(self, tflops: float) -> float:
        """Time of some work."""
        return tflops / (self.tflops_per_s * self.efficiency)

    def teaching_s(self, tflops: float) -> float:
        """Time of a family's teacher on one image."""
        return self.seconds(tflops) if self.costs is None else self.costs.teach_s


# Peaks and memory: vendors' data sheets. Efficiency: 40% on GPUs, an assumption until it is measured.
DEVICES = {
    device.name: device
    for device in (
        Device("h100", 989.0, 80.0, 0.4),
        Device("h200", 989.0, 141.0, 0.4),
        Device("a100", 312.0, 80.0, 0.4),
        Device("rtx4090", 165.2, 24.0, 0.4),  # sums in fp32, dense: Ada architecture white paper
        Device("rtx5090", 209.5, 32.0, 0.4),  # the same of the RTX Blackwell white paper
        Device("cpu", 0.05, 16.0, 0.5),  # one core with AVX-512
    )
}
DEFAULT_DEVICE = DEVICES["h100"]
MEASURED_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrix whose product is timed
MEASURED_S = 0.5


def find_device(name: str) -> Device:
    """A device by name; ``measured`` times a matrix product here, in the precision that trains here.

    Raises:
        PlanError: the name is another one.
    """
    if name in DEVICES:
        return DEVICES[name]
    if name != "measured":
        known = ", ".join([*DEVICES, "measured"])
        raise PlanError(f"--device {name}: not known", fix=f"Choose one of {known}.")
    import torch  # what only plans needs none

    has_gpu = torch.cuda.is_available()
    where, dtype = ("cuda", torch.bfloat16) if has_gpu else ("cpu", torch.float32)
    side = MEASURED_SIDE[where]
    matrix = torch.randn(side, side, device=where, dtype=dtype)
    float((matrix @ matrix)[0, 0])  # first call: libraries load
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < MEASURED_S:
        float((matrix @ matrix)[0, 0])  # waits for the device
        products += 1
    tflops = products * 2.0 * side**3 / (time.perf_counter() - started) / 1e12
    if has_gpu:
        memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    else:
        memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Device("measured", tflops, memory_gib, 0.5)


@dataclass(frozen=True)
class CropShapes:
    """Pixels per side and number of the crops of one image, and the masked patches expected per image."""

    global_size: int
    local_size: int
    num_locals: int
    masked_per_image: float

    def scaled(self, scale: float) -> "CropShapes":
        """The shapes of a network that takes crops at a part of their size; it predicts as many patches."""
        return replace(
            self,
            global_size=scaled_size(self.global_size, scale),
            local_size=scaled_size(self.local_size, scale),
        )


def backbone_tflops(spec: BackboneSpec, size: int) -> float:
    """Teraflops of one forward pass on one crop of ``size`` pixels."""
    return spec.flops(size) / 1e12


def _head_flops(head: HeadShape, rows: float) -> float:
    return 2.0 * rows * (head.width * head.hidden + head.hidden**2 + head.hidden * head.bottleneck)


Heads = tuple[HeadShape, HeadShape]  # DINO, iBOT


def teaching_tflops(spec: BackboneSpec, heads: Heads | None, crops: CropShapes) -> float:
    """Teraflops of a frozen teacher on one image: two global crops, and its heads where it has any."""
    backbone = 2 * backbone_tflops(spec, crops.global_size)
    return backbone + (0.0 if heads is None else _heads_tflops(heads, 2, crops))


def training_tflops(
    spec: BackboneSpec,
    heads: Heads,
    crops: CropShapes,
    *,
    survival: float = 1.0,
    is_twice: bool = False,
) -> float:
    """Teraflops of one network's step on one image: all crops, heads, prototypes, Sinkhorn, backward.

    ``survival``: part of the rows that pass through a block. ``is_twice``: blocks run forward again for
    the backward pass.
    """
    rows = 2 + crops.num_locals
    trained = TRAINING_FACTOR * _heads_tflops(heads, rows, crops)
    backbone = _trained_tflops(spec, crops) + (_crops_tflops(spec, crops) if is_twice else 0.0)
    return survival * backbone + trained + _logits_tflops(heads, crops)


def fitting_tflops(spec: BackboneSpec, heads: Heads, crops: CropShapes) -> float:
    """Teraflops of one step of fitting heads on one image: the backbone forward only, the heads in training."""
    trained = TRAINING_FACTOR * _heads_tflops(heads, 2 + crops.num_locals, crops)
    return _crops_tflops(spec, crops) + trained + _logits_tflops(heads, crops)


def regression_tflops(spec: BackboneSpec, teacher_dim: int, crops: CropShapes) -> float:
    """Teraflops of one student's step on one image without heads: all crops, two projectors, backward."""
    rows = 2 + crops.num_locals + crops.masked_per_image
    projected = 2.0 * rows * spec.width * teacher_dim / 1e12
    return _trained_tflops(spec, crops) + TRAINING_FACTOR * projected


def _crops_tflops(spec: BackboneSpec, crops: CropShapes) -> float:
    of_locals = (
        crops.num_locals * backbone_tflops(spec, crops.local_size) if crops.num_locals else 0.0
    )
    return 2 * backbone_tflops(spec, crops.global_size) + of_locals


def _trained_tflops(spec: BackboneSpec, crops: CropShapes) -> float:
    """Three forward passes' worth, but the gradient of the pixels is not computed."""
    first = 2 * spec.first_layer_flops(crops.global_size)
    first += crops.num_locals * spec.first_layer_flops(crops.local_size)
    return TRAINING_FACTOR * _crops_tflops(spec, crops) - first / 1e12


def _heads_tflops(heads: Heads, rows: int, crops: CropShapes) -> float:
    dino, ibot = heads
    return (_head_flops(dino, rows) + _head_flops(ibot, crops.masked_per_image)) / 1e12


def _logits_tflops(heads: Heads, crops: CropShapes) -> float:
    dino, ibot = heads
    rows = 2 + crops.num_locals
    logits = dino.prototypes * dino.bottleneck * (PROTOTYPE_PASSES * rows + SINKHORN_PASSES * 2)
    passes = (PROTOTYPE_PASSES + SINKHORN_PASSES) * crops.masked_per_image
    return 2.0 * (logits + ibot.prototypes * ibot.bottleneck * passes) / 1e12
