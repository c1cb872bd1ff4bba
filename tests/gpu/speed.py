"""Seconds: a matrix product, the teacher at several sizes, every student's step by part, loss and Sinkhorn alone."""

from collections.abc import Callable
from typing import Any

import torch

from students.shapes import student_heads
from teacher.chunks import LogitSteps
from tests.gpu.clock import (
    Figures,
    measure_s,
    peak_gib,
    reason_of,
    release,
    shown_gib,
)
from tests.gpu.networks import (
    DTYPE,
    TEMPERATURE,
    build_batch,
    build_prototypes,
    build_task,
    build_teacher,
    halving,
    scalars,
    unit_rows,
)
from tests.gpu.sizes import Sizes


def matmul(device: torch.device, sizes: Sizes) -> Figures:
    """Rate of a square matrix product in bf16, beside which the others are to be seen."""
    side = sizes.matmul_side
    matrix = torch.randn(side, side, device=device, dtype=DTYPE)
    seconds = measure_s(device, lambda: matrix @ matrix, sizes.repeats)
    return {"side": side, "ms": 1e3 * seconds, "tflops_per_s": 2.0 * side**3 / seconds / 1e12}


def teacher_eager(device: torch.device, sizes: Sizes) -> Figures:
    """Milliseconds per image and rate of the teacher at every micro-batch."""
    teacher = build_teacher(device, sizes, 1)
    weights = peak_gib(device)
    return {
        "weights_gib": shown_gib(weights),
        **_by_images(device, sizes, teacher.backbone, sizes.teacher_images),
        **matmul(device, sizes),
    }


def teacher_compiled(device: torch.device, sizes: Sizes) -> Figures:
    """The same with compiled blocks; a size whose compilation raises is a figure that says so."""
    teacher = build_teacher(device, sizes, 1, has_heads=False)
    for block in teacher.backbone.layer:  # type: ignore[union-attr]
        block.compile(backend=sizes.compile_backend, dynamic=False)
    return _by_images(device, sizes, teacher.backbone, sizes.compiled_images)


def _by_images(
    device: torch.device, sizes: Sizes, backbone: Any, counts: tuple[int, ...]
) -> Figures:
    figures: Figures = {}
    size = sizes.crops.global_size
    for images in counts:
        name = f"{images} images"
        try:
            release(device)
            pixels = torch.randn(2 * images, 3, size, size, device=device, dtype=DTYPE)
            with torch.no_grad():
                seconds = measure_s(device, lambda p=pixels: backbone(p), sizes.repeats)  # type: ignore[misc]
        except Exception as error:
            figures[name] = reason_of(error)
            figures.setdefault("problems", []).append(f"{name}: {figures[name]}")
            continue
        tflops = 2 * images * sizes.teacher.flops(size) / 1e12
        figures[name] = {
            "ms_per_image": 1e3 * seconds / images,
            "tflops_per_s": tflops / seconds,
            "peak_gib": shown_gib(peak_gib(device)),
        }
    return figures


def student(name: str) -> Callable[[torch.device, Sizes], Figures]:
    """The check of one network of the catalogue: forward and loss, backward, step."""

    def check(device: torch.device, sizes: Sizes) -> Figures:
        return _student_step(name, device, sizes)

    return check


def _student_step(name: str, device: torch.device, sizes: Sizes) -> Figures:
    """Seconds of every part. AdamW is torch's, on the bf16 weights, without fp32 copies: so a 7B fits on one GPU."""
    from distill.plan.flops import CropShapes, training_tflops

    spec, crops = sizes.networks[name], sizes.crops
    task = build_task(spec, device, sizes).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-5, fused=True)
    prototypes, numbers = build_prototypes(device, sizes), scalars()
    parts = dict[str, float]()

    def step(images: int) -> None:
        batch = build_batch(images, device, sizes)
        targets = prototypes.assign(batch)

        def forward() -> torch.Tensor:
            losses: torch.Tensor = task(batch, targets, numbers).total
            return losses

        def backward() -> None:
            optimizer.zero_grad()
            forward().backward()

        release(device)
        parts["sinkhorn_ms"] = 1e3 * measure_s(
            device, lambda: prototypes.assign(batch), sizes.repeats
        )
        parts["forward_ms"] = 1e3 * measure_s(device, lambda: forward().detach(), sizes.repeats)
        both = 1e3 * measure_s(device, backward, sizes.repeats)
        parts["backward_ms"] = both - parts["forward_ms"]
        parts["step_ms"] = 1e3 * measure_s(device, optimizer.step, sizes.repeats)
        parts["loss"] = float(forward().detach())

    images = halving(sizes.images.get(name, sizes.images_default), device, step)
    shapes = CropShapes(crops.global_size, crops.local_size, crops.num_locals, crops.masked)
    heads = student_heads(spec.width, *sizes.heads, *sizes.student_hidden)
    seconds = sum(value for part, value in parts.items() if part.endswith("_ms")) / 1e3
    tflops = images * training_tflops(spec, heads, shapes)
    return {
        "images": images,
        **parts,
        "ms_per_image": 1e3 * seconds / images,
        "tflops_per_s": tflops / seconds,
        "peak_gib": shown_gib(peak_gib(device)),
    }


def losses(device: torch.device, sizes: Sizes) -> Figures:
    """Milliseconds per image of Sinkhorn and of the cross-entropies alone, forward and both ways, in chunks and in kernels without logits."""
    from teacher.chunks import AS_WRITTEN
    from teacher.kernels import KernelSteps

    figures = _losses(device, sizes, AS_WRITTEN)
    if device.type == "cuda":
        found = _losses(device, sizes, KernelSteps(AS_WRITTEN))
        figures |= {f"{name} in kernels": value for name, value in found.items()}
    return figures


def _losses(device: torch.device, sizes: Sizes, steps: LogitSteps) -> Figures:
    from teacher.chunks import sinkhorn
    from teacher.heads import cross_entropy

    images, crops = sizes.images_default, sizes.crops
    figures: Figures = {"images": images}
    kinds = (
        ("dino", sizes.heads[0], 2 + crops.num_locals, images, 2),
        ("ibot", sizes.heads[1], 1, images * crops.masked, 1),
    )
    for name, head, num_crops, rows, num_targets in kinds:
        release(device)
        prototypes = unit_rows(head.prototypes, head.bottleneck, device, 4).requires_grad_()
        targets = unit_rows(num_targets * rows, head.bottleneck, device, 5)
        rows_of = unit_rows(num_crops * rows, head.bottleneck, device, 6)
        student_rows = rows_of.view(num_crops, rows, -1).requires_grad_()
        assigned = sinkhorn(targets, prototypes.detach(), TEMPERATURE, None, steps)
        mixture = torch.full((num_crops, num_targets), 1.0 / num_targets, device=device)
        weights = torch.full((rows,), 1.0 / rows, device=device)
        works: dict[str, Callable[[], object]] = {
            "sinkhorn": lambda t=targets, p=prototypes: sinkhorn(
                t, p.detach(), TEMPERATURE, None, steps
            ),
            "forward": lambda a=(student_rows, prototypes, assigned, mixture, weights): (
                cross_entropy(*a, steps).detach()
            ),
            "both ways": lambda a=(student_rows, prototypes, assigned, mixture, weights): (
                cross_entropy(*a, steps).backward()
            ),
        }
        for work_name, work in works.items():
            seconds = measure_s(device, work, sizes.repeats)
            figures[f"{name} {work_name} ms_per_image"] = 1e3 * seconds / images
        figures[f"{name} peak_gib"] = shown_gib(peak_gib(device))
    return figures
