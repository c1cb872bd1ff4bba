"""DINO, iBOT and KoLeo, each equal to its nested-loop definition and independent of how rows are split over ranks.

DINO and iBOT are one function: cross-entropy between a student's softmax over prototypes and a
mixture of assignments. It walks over the prototypes in chunks with a running log-sum-exp and
recomputes the chunk in the backward pass, so memory is [rows, chunk] and never [rows, prototypes]
(six matrix products instead of four; exact).

Sums, not means, leave this file: the caller divides by counts of the *global* batch, so that adding
up ranks is exact when they hold different numbers of images.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from teacher.shapes import PROTOTYPES_AT_ONCE
from teacher.sinkhorn import SoftAssignment

STUDENT_TEMPERATURE = 0.1
KOLEO_EPS = 1e-8  # fp32; keeps the logarithm finite for duplicate images


class PrototypeCrossEntropy(torch.autograd.Function):
    """Sum over crops and rows of weighted cross-entropies to mixtures of assignments; see ``cross_entropy``."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Float[Tensor, "crops rows bottleneck"],
        prototypes: Float[Tensor, "prototypes bottleneck"],
        assignment: SoftAssignment,
        mixture: Float[Tensor, "crops targets"],
        weights: Float[Tensor, " rows"],
    ) -> Float[Tensor, ""]:
        num_crops, num_rows = student.shape[:2]
        dtype = assignment.log_rows.dtype
        peak = student.new_full((num_crops, num_rows), -torch.inf, dtype=dtype)
        total = student.new_zeros((num_crops, num_rows), dtype=dtype)
        mass = torch.zeros_like(total)
        dot = torch.zeros_like(total)
        for start in range(0, prototypes.shape[0], PROTOTYPES_AT_ONCE):
            logits, target = _chunk(student, prototypes, assignment, mixture, start)
            mass += target.sum(dim=-1)
            dot += (target * logits).sum(dim=-1)
            new_peak = torch.maximum(peak, logits.amax(dim=-1))
            chunk_total = logits.sub_(new_peak[..., None]).exp_().sum(dim=-1)
            total = total * (peak - new_peak).exp() + chunk_total
            peak = new_peak
        log_total = peak + total.log()
        ctx.save_for_backward(student, prototypes, mixture, weights, log_total, mass)
        ctx.assignment = assignment
        return (weights * (mass * log_total - dot)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, prototypes, mixture, weights, log_total, mass = ctx.saved_tensors
        (grad,) = grads
        scale = (weights * grad / STUDENT_TEMPERATURE)[None, :, None]
        grad_student = torch.zeros(student.shape, dtype=log_total.dtype, device=student.device)
        grad_prototypes = torch.empty_like(prototypes)
        for start in range(0, prototypes.shape[0], PROTOTYPES_AT_ONCE):
            chunk = slice(start, start + PROTOTYPES_AT_ONCE)
            logits, target = _chunk(student, prototypes, ctx.assignment, mixture, start)
            softmax = logits.sub_(log_total[..., None]).exp_()
            grad_logits = softmax.mul_(mass[..., None]).sub_(target).mul_(scale).to(student.dtype)
            grad_student += grad_logits @ prototypes[chunk]
            grad_prototypes[chunk] = grad_logits.flatten(0, 1).T @ student.flatten(0, 1)
        return grad_student.to(student.dtype), grad_prototypes, None, None, None


def _chunk(
    student: Float[Tensor, "crops rows bottleneck"],
    prototypes: Float[Tensor, "prototypes bottleneck"],
    assignment: SoftAssignment,
    mixture: Float[Tensor, "crops targets"],
    start: int,
) -> tuple[Tensor, Tensor]:
    """Student logits and mixed targets, both [crops, rows, chunk], for one chunk of prototypes."""
    stop = min(start + PROTOTYPES_AT_ONCE, prototypes.shape[0])
    dtype = assignment.log_rows.dtype
    logits = (student @ prototypes[start:stop].T).to(dtype).mul_(1.0 / STUDENT_TEMPERATURE)
    columns = assignment.columns(start, stop)
    num_targets = mixture.shape[1]
    per_target = columns.view(num_targets, student.shape[1], stop - start)
    target = torch.einsum("ct,tnk->cnk", mixture.to(dtype), per_target)
    return logits, target


def cross_entropy(
    student: Float[Tensor, "crops rows bottleneck"],
    prototypes: Float[Tensor, "prototypes bottleneck"],
    assignment: SoftAssignment,
    mixture: Float[Tensor, "crops targets"],
    weights: Float[Tensor, " rows"],
) -> Float[Tensor, ""]:
    """Weighted sum of cross-entropies between student crops and the teacher targets they are paired with.

    for each student crop c, target crop t, row n:
        loss -= mixture[c, t] * weights[n] * sum_k p[t, n, k] * log_softmax(student[c, n] .
        prototypes / 0.1)[k]

    The assignment's rows are ordered target crop first: [targets * rows]. fp32 inside (float64 if
    the assignment is). Gradients go to ``student`` and ``prototypes`` only. No communication.

    Source: DINOv3 report, section 3.1; Caron et al. 2021, equation 3.
    """
    loss: Tensor = PrototypeCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        student, prototypes, assignment, mixture, weights
    )
    return loss


def koleo_sum(
    class_tokens: Float[Tensor, "images width"],
    group_size: int,
    start: int,
    images_global: int,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Sum over this rank's images of minus the log distance to the nearest other image of its KoLeo group.

    The global batch is cut into KoLeo groups of ``group_size`` consecutive positions (the last may
    be smaller; a lone image adds nothing). ``start`` is the position of the first row here. The
    nearest neighbour is chosen without gradient; the distance has gradients on both sides.

    fp32 (float64 stays). Communication: none when no KoLeo group is cut by a rank border (pass
    ``group=None``); otherwise one all-gather forward and one all-reduce backward over ``group``,
    which every rank of it must call.

    Source: DINOv2, section 4 (KoLeo); DINOv3 report, section 3.1 (groups of 16).
    """
    features = class_tokens if class_tokens.dtype == torch.float64 else class_tokens.float()
    features = F.normalize(features, dim=-1, eps=KOLEO_EPS)
    everyone, first = features, start
    if group is not None:
        everyone = _GatherRows.apply(features, start, images_global, group)  # type: ignore[no-untyped-call]
        first = 0
    local = torch.arange(start, start + features.shape[0], device=features.device)
    others = torch.arange(first, first + everyone.shape[0], device=features.device)
    comparable = (local // group_size)[:, None] == (others // group_size)[None]
    comparable &= local[:, None] != others[None]
    with torch.no_grad():
        similarity = (features @ everyone.T).masked_fill(~comparable, -torch.inf)
        nearest = similarity.argmax(dim=1)
        has_neighbour = comparable.any(dim=1)
    distance = torch.linalg.vector_norm(features - everyone[nearest] + KOLEO_EPS, dim=1)
    return -((distance + KOLEO_EPS).log() * has_neighbour).sum()


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks of a group, placed at their positions in the global batch; gradients are summed back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, start: int, images_global: int, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.start, ctx.num_rows, ctx.group = start, rows.shape[0], group
        everyone = rows.new_zeros(images_global, rows.shape[1])
        everyone[start : start + rows.shape[0]] = rows
        dist.all_reduce(everyone, group=group)  # slices are disjoint: a sum with zeros is exact
        return everyone

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.start : ctx.start + ctx.num_rows], None, None, None
