"""What a step costs: floating-point operations per network and phase, from shapes alone.

A multiply-add counts as two. Only matrix products and convolutions are counted; they are over 95%
of the work of every network here. Training costs three forward passes. The plan uses ratios of
these numbers; measured times may replace them.
"""

from dataclasses import dataclass

from students.catalog import BackboneSpec
from students.convnext import ConvNeXtSpec
from teacher.heads import HeadShape
from teacher.vit import ViTSpec

TRAINING_FACTOR = 3.0  # forward, gradient of the inputs, gradient of the weights
# Products with the prototypes that the method needs: the student's logits and their two gradients, and
# the teacher's logits once per Sinkhorn iteration. Walking over them in chunks, which saves the memory
# of all logits, repeats four.
PROTOTYPE_PASSES = 3.0
SINKHORN_PASSES = 3.0


@dataclass(frozen=True)
class Device:
    """What a plan assumes of one device. ``tflops_per_s`` is the peak of dense bf16 products, ``efficiency`` the part of it that training reaches."""

    name: str
    tflops_per_s: float
    memory_gib: float
    efficiency: float

    def seconds(self, tflops: float) -> float:
        """Time of some work."""
        return tflops / (self.tflops_per_s * self.efficiency)


# Peaks and memory: vendors' data sheets. Efficiency: 40% on GPUs, an assumption until it is measured.
DEVICES = {
    device.name: device
    for device in (
        Device("h100", 989.0, 80.0, 0.4),
        Device("h200", 989.0, 141.0, 0.4),
        Device("a100", 312.0, 80.0, 0.4),
        Device("cpu", 0.05, 16.0, 0.5),  # one core with AVX-512
    )
}
DEFAULT_DEVICE = DEVICES["h100"]


@dataclass(frozen=True)
class CropShapes:
    """Pixels per side and number of the crops of one image, and the masked patches expected per image."""

    global_size: int
    local_size: int
    num_locals: int
    masked_per_image: float


def backbone_tflops(spec: BackboneSpec, size: int) -> float:
    """Teraflops of one forward pass on one crop of ``size`` pixels."""
    if isinstance(spec, ConvNeXtSpec):
        return _convnext_flops(spec, size) / 1e12
    return _vit_flops(spec, size) / 1e12


def _vit_flops(spec: ViTSpec, size: int) -> float:
    tokens = (size // spec.patch) ** 2 + 1 + spec.registers
    matrices = 4 * spec.width**2 + (3 if spec.ffn == "swiglu" else 2) * spec.width * spec.ffn_width
    attention = 4 * tokens**2 * spec.width
    embedding = 2 * (size // spec.patch) ** 2 * spec.in_channels * spec.patch**2 * spec.width
    return float(embedding + spec.depth * (2 * tokens * matrices + attention))


def _convnext_flops(spec: ConvNeXtSpec, size: int) -> float:
    side = size // 4
    flops = 2.0 * side**2 * 16 * spec.in_channels * spec.widths[0]
    for stage, (depth, width) in enumerate(zip(spec.depths, spec.widths, strict=True)):
        if stage:
            side //= 2
            flops += 2.0 * side**2 * 4 * spec.widths[stage - 1] * width
        flops += depth * 2.0 * side**2 * (49 * width + 8 * width**2)
    return flops


def _head_flops(head: HeadShape, rows: float) -> float:
    return 2.0 * rows * (head.width * head.hidden + head.hidden**2 + head.hidden * head.bottleneck)


Heads = tuple[HeadShape, HeadShape]  # DINO, iBOT


def teaching_tflops(spec: BackboneSpec, heads: Heads | None, crops: CropShapes) -> float:
    """Teraflops of a frozen teacher on one image: two global crops, and its heads where it has any."""
    backbone = 2 * backbone_tflops(spec, crops.global_size)
    return backbone + (0.0 if heads is None else _heads_tflops(heads, 2, crops))


def training_tflops(spec: BackboneSpec, heads: Heads, crops: CropShapes) -> float:
    """Teraflops of one student's step on one image: all crops, heads, prototypes, Sinkhorn, backward."""
    rows = 2 + crops.num_locals
    forward = _crops_tflops(spec, crops) + _heads_tflops(heads, rows, crops)
    return TRAINING_FACTOR * forward + _logits_tflops(heads, crops)


def fitting_tflops(spec: BackboneSpec, heads: Heads, crops: CropShapes) -> float:
    """Teraflops of one step of fitting heads on one image: the backbone forward only, the heads in training."""
    trained = TRAINING_FACTOR * _heads_tflops(heads, 2 + crops.num_locals, crops)
    return _crops_tflops(spec, crops) + trained + _logits_tflops(heads, crops)


def regression_tflops(spec: BackboneSpec, taught_width: int, crops: CropShapes) -> float:
    """Teraflops of one student's step on one image without heads: all crops, two projectors, backward."""
    rows = 2 + crops.num_locals + crops.masked_per_image
    projected = 2.0 * rows * spec.width * taught_width / 1e12
    return TRAINING_FACTOR * (_crops_tflops(spec, crops) + projected)


def _crops_tflops(spec: BackboneSpec, crops: CropShapes) -> float:
    of_locals = (
        crops.num_locals * backbone_tflops(spec, crops.local_size) if crops.num_locals else 0.0
    )
    return 2 * backbone_tflops(spec, crops.global_size) + of_locals


def _heads_tflops(heads: Heads, rows: int, crops: CropShapes) -> float:
    dino, ibot = heads
    return (_head_flops(dino, rows) + _head_flops(ibot, crops.masked_per_image)) / 1e12


def _logits_tflops(heads: Heads, crops: CropShapes) -> float:
    dino, ibot = heads
    rows = 2 + crops.num_locals
    logits = dino.prototypes * dino.bottleneck * (PROTOTYPE_PASSES * rows + SINKHORN_PASSES * 2)
    passes = (PROTOTYPE_PASSES + SINKHORN_PASSES) * crops.masked_per_image
    return 2.0 * (logits + ibot.prototypes * ibot.bottleneck * passes) / 1e12
