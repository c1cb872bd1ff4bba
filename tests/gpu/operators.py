"""Operators of ``teacher/`` and ``students/`` on the device against the CPU, outputs and gradients.

Inputs and weights are drawn on the CPU and rounded to the dtype, so that both sides begin with the same numbers; the
reference then computes in fp32 on the CPU. What counts is the length of the difference over the length of
the reference, of all outputs and gradients of an operator.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from students.shapes import BackboneSpec, ConvNeXtSpec
from teacher.shapes import HeadShape, ViTSpec
from tests.gpu.clock import Figures, reason_of, synchronize
from tests.gpu.sizes import Sizes

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 6e-2}  # fp32 without TF32; bf16 has 8 bits
IMAGES, LOCALS = 8, 2
CPU = torch.device("cpu")


class Inputs:
    """Where an operator is tried: draws numbers of ``rounded`` precision for ``device`` in ``dtype``."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, rounded: torch.dtype, width: int
    ) -> None:
        self.device, self.dtype, self.rounded, self.width = device, dtype, rounded, width
        self._generator = torch.Generator().manual_seed(0)

    def draw(self, *shape: int, has_grad: bool = True) -> Tensor:
        """Normal numbers."""
        drawn = torch.randn(*shape, generator=self._generator).to(self.rounded)
        return drawn.to(self.device, self.dtype).requires_grad_(has_grad)

    def put(self, network: nn.Module) -> nn.Module:
        """A network with drawn weights."""
        with torch.no_grad():
            for parameter in network.parameters():
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
                drawn = torch.randn(parameter.shape, generator=self._generator)
                parameter.copy_((drawn * max(1, fan_in) ** -0.5).to(self.rounded))
        return network.to(self.device, self.dtype)


Operator = Callable[[Inputs], Sequence[Tensor]]


def compare(device: torch.device, sizes: Sizes) -> Figures:
    """Relative differences by operator and dtype; above its limit, or not finite, one is a problem."""
    figures: Figures = {"problems": []}
    for name, operator in OPERATORS.items():
        for dtype, limit in LIMITS.items():
            key = f"{name} {str(dtype).removeprefix('torch.')}"
            try:
                found = operator(Inputs(device, dtype, dtype, sizes.operator_width))
                synchronize(device)
                reference = Inputs(CPU, torch.float32, dtype, sizes.operator_width)
                difference = relative_difference(found, operator(reference))
            except Exception as error:
                figures[key] = reason_of(error)
                figures["problems"].append(f"{key}: {figures[key]}")
                continue
            figures[key] = difference if difference < torch.inf else "not finite"
            if not difference <= limit:
                figures["problems"].append(f"{key} differs by {difference:.2g} of {limit:g}")
    return figures


def relative_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Length of the difference over the length of the reference; infinite where a number is not finite."""
    mine, other = (
        torch.cat([each.detach().double().cpu().flatten() for each in tensors])
        for tensors in (found, expected)
    )
    difference = float((mine - other).norm() / other.norm())
    return difference if difference == difference else float("inf")


def with_gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of the inputs, each at length one; the loss weighs numbers differently, as a norm would be constant after a norm layer."""
    total = torch.stack([(output.float() * _weights(output)).sum() for output in outputs]).sum()
    gradients = torch.autograd.grad(total, list(inputs), allow_unused=True)
    tensors = [*outputs, *(each for each in gradients if each is not None)]
    return [each / each.detach().float().norm().clamp(min=1e-12) for each in tensors]


def _weights(output: Tensor) -> Tensor:
    """The same numbers between -1 and 1 on every device."""
    steps = torch.arange(output.numel(), dtype=torch.float64)
    return (steps * 0.7).cos().float().view(output.shape).to(output.device)


def _backbone(spec: BackboneSpec, *, is_local: bool = False) -> Operator:
    def run(inputs: Inputs) -> list[Tensor]:
        network = inputs.put(spec_at(spec, inputs.width).build())
        pixels = inputs.draw(IMAGES, 3, 64, 64)
        features = network(pixels, is_local=is_local)
        outputs = [features.class_token, features.patch_tokens]
        return with_gradients(outputs, [pixels, *network.parameters()])

    return run


def spec_at(spec: BackboneSpec, width: int) -> BackboneSpec:
    """A network of the same kind, two blocks deep, at a width."""
    if isinstance(spec, ConvNeXtSpec):
        return ConvNeXtSpec((1, 1), (width // 2, width), layerscale_init=1.0)
    assert isinstance(spec, ViTSpec), "two kinds"
    return ViTSpec(
        width,
        2,
        width // 16,
        2 * width,
        ffn=spec.ffn,
        untie_local_norm=spec.untie_local_norm,
        layerscale_init=1.0,
    )


def _head(inputs: Inputs) -> list[Tensor]:
    from teacher.heads import Head

    head = Head(HeadShape(inputs.width, 2 * inputs.width, 16, 40))
    inputs.put(head)
    tokens = inputs.draw(IMAGES, inputs.width)
    return with_gradients([head(tokens)], [tokens, *head.mlp.parameters()])


def _kernels(inputs: Inputs) -> list[Tensor]:
    """On a GPU, in bf16, without logits in memory."""
    from teacher.chunks import AS_WRITTEN
    from teacher.kernels import KernelSteps

    is_gpu = inputs.device.type == "cuda"
    return _cross_entropy(inputs, KernelSteps(AS_WRITTEN) if is_gpu else AS_WRITTEN)


def _cross_entropy(inputs: Inputs, steps: Any = None) -> list[Tensor]:
    from teacher.chunks import AS_WRITTEN, sinkhorn
    from teacher.heads import cross_entropy

    steps = steps or AS_WRITTEN
    prototypes, student = inputs.draw(48, 16), inputs.draw(3, IMAGES, 16)
    targets = inputs.draw(2 * IMAGES, 16, has_grad=False)
    assignment = sinkhorn(targets / 4, prototypes.detach(), 1.0, None, steps)
    mixture = torch.full((3, 2), 0.5, device=inputs.device)
    weights = torch.full((IMAGES,), 1.0 / IMAGES, device=inputs.device)
    loss = cross_entropy(student, prototypes, assignment, mixture, weights, steps)
    return [
        *with_gradients([loss], [student, prototypes]),
        assignment.log_rows / assignment.log_rows.norm(),
        assignment.log_columns / assignment.log_columns.norm(),
    ]


def _koleo(inputs: Inputs) -> list[Tensor]:
    from teacher.losses import koleo_sum

    tokens = inputs.draw(2 * IMAGES, inputs.width)
    return with_gradients([koleo_sum(tokens, 16, 0, 2 * IMAGES)], [tokens])


def _gram(inputs: Inputs) -> list[Tensor]:
    from teacher.gram import gram_sum

    student = inputs.draw(IMAGES, 16, inputs.width)
    anchor = inputs.draw(IMAGES, 16, 2 * inputs.width, has_grad=False)
    return with_gradients([gram_sum(student, anchor)], [student])


def _resize(mode: str) -> Operator:
    def run(inputs: Inputs) -> list[Tensor]:
        from teacher.batch import resize_grid

        patches = inputs.draw(IMAGES, 36, inputs.width)
        return with_gradients([resize_grid(patches, (6, 6), (4, 4), mode)], [patches])

    return run


def _antialias(inputs: Inputs) -> list[Tensor]:
    """As crops are shrunk: always in fp32."""
    from teacher.batch import shrunk

    pixels = inputs.draw(IMAGES, 3, 64, 64).detach().float()
    return [shrunk(pixels, 0.5)]


def _normalise(inputs: Inputs) -> list[Tensor]:
    from teacher.batch import normalise

    pixels = torch.arange(0, 192, dtype=torch.uint8).view(1, 1, 3, 8, 8)
    pixels = pixels.to(inputs.device)
    stats = torch.full((1, 2, 3), 0.4, device=inputs.device)
    shift, scale = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    return [
        normalise(pixels, shift, scale, inputs.dtype),
        normalise(pixels, shift, scale, inputs.dtype, stats),
    ]


def _drop_path(inputs: Inputs) -> list[Tensor]:
    from teacher.drop_path import active_rows

    flags = torch.arange(IMAGES * 3 * 2 * 2).view(IMAGES, 3, 2, 2) % 3 > 0
    rows = active_rows(flags, 0.6, inputs.device)
    tokens = inputs.draw(3 * IMAGES, 4, inputs.width)
    return with_gradients([rows.add(tokens, torch.sin, 1)], [tokens])


def _features(inputs: Inputs) -> list[Tensor]:
    from students.objective import ChannelStatistics, feature_sums

    rows = inputs.draw(IMAGES, inputs.width)
    statistics = ChannelStatistics(inputs.width, inputs.device)
    target = statistics.standardise(inputs.draw(IMAGES, inputs.width, has_grad=False), None)
    weights = torch.full((IMAGES,), 1.0 / IMAGES, device=inputs.device)
    return with_gradients(list(feature_sums(rows, target, weights)), [rows])


def _masks(inputs: Inputs) -> list[Tensor]:
    from teacher.batch import PatchMasks

    flags = torch.arange(IMAGES * 2 * 16).view(IMAGES, 2, 16) % 5 == 0
    return [PatchMasks.of(flags.to(inputs.device)).rows().double()]


VIT = ViTSpec(16, 1, 1, 16)
OPERATORS: dict[str, Operator] = {
    "vit": _backbone(VIT),
    "vit swiglu": _backbone(ViTSpec(16, 1, 1, 16, ffn="swiglu")),
    "vit local": _backbone(ViTSpec(16, 1, 1, 16, untie_local_norm=True), is_local=True),
    "convnext": _backbone(ConvNeXtSpec((1, 1), (8, 16))),
    "head": _head,
    "sinkhorn and cross-entropy": _cross_entropy,
    "the same in kernels": _kernels,
    "koleo": _koleo,
    "gram": _gram,
    "resize bilinear": _resize("bilinear"),
    "resize bicubic": _resize("bicubic"),
    "resize antialias": _antialias,
    "normalise": _normalise,
    "drop path": _drop_path,
    "feature sums": _features,
    "masked rows": _masks,
}
