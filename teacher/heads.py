"""The DINO and iBOT heads: an MLP to an L2-normalised bottleneck, prototypes, and what both are for.

A head is two modules because two different things are done with it: everybody computes the
bottleneck, which is small and travels between ranks; only a task compares it with its
prototypes, inside the loss.

Targets are Sinkhorn-Knopp assignments of features to prototypes, kept as two vectors instead of a
[rows, prototypes] matrix. The assignment factors:
``p[n, k] = exp(x_n . v_k / temperature + log_rows[n] + log_columns[k])``. So three iterations need
only one pass over the logits each, in chunks of rows, and what remains is one number per row and one
per prototype. The caller that uses ``p`` rebuilds the chunk at hand from the bottleneck (512 numbers a
row, against 262,144 logits).

DINO and iBOT are one function: cross-entropy between a student's softmax over prototypes and a
mixture of assignments. It walks over the prototypes in chunks with a running log-sum-exp and
recomputes the chunk in the backward pass, so memory is [rows, chunk] and never [rows, prototypes]
(six matrix products instead of four; exact).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from teacher.init import fill_random_, init_matrix_
from teacher.peers import waiting_for_peers
from teacher.shapes import PROTOTYPES_AT_ONCE, HeadShape

ITERATIONS = 3
ROWS_AT_ONCE = 256  # a chunk of logits is [256, prototypes]: 256 MiB in fp32 for 262,144 prototypes
STUDENT_TEMPERATURE = 0.1
NORM_EPS = 1e-6  # fp32 and bf16; an all-zero projection stays finite


@dataclass(frozen=True)
class SoftAssignment:
    """Soft targets ``p[n, k]`` in factored form; every row of ``p`` sums to one."""

    bottleneck: Float[Tensor, "rows bottleneck"]
    prototypes: Float[Tensor, "prototypes bottleneck"]
    log_rows: Float[Tensor, " rows"]
    log_columns: Float[Tensor, " prototypes"]
    temperature: float

    def part(self, rows: slice, blocks: int = 1) -> "SoftAssignment":
        """The assignment of some rows, the same of each of ``blocks`` equal blocks; the balance stays that of all."""
        bottleneck, log_rows = (
            tensor.unflatten(0, (blocks, -1 if len(tensor) else 0))[:, rows].flatten(0, 1)
            for tensor in (self.bottleneck, self.log_rows)
        )
        return replace(self, bottleneck=bottleneck, log_rows=log_rows)

    def columns(self, start: int, stop: int) -> Float[Tensor, "rows columns"]:
        """``p[:, start:stop]``, in the dtype of the log factors (fp32, or float64 in tests)."""
        logits = self.bottleneck @ self.prototypes[start:stop].T
        logits = logits.to(self.log_rows.dtype).mul_(1.0 / self.temperature)
        return logits.add_(self.log_rows[:, None]).add_(self.log_columns[start:stop]).exp_()


@torch.no_grad()
def sinkhorn(
    bottleneck: Float[Tensor, "rows bottleneck"],
    prototypes: Float[Tensor, "prototypes bottleneck"],
    temperature: float,
    group: dist.ProcessGroup | None = None,
) -> SoftAssignment:
    """SoftAssignment of all rows of the group to the prototypes, each prototype used equally often.

    for each of 3 iterations:
        columns: every prototype gets the same total weight over all rows of the group
        rows: the weights of each row sum to one

    Runs in fp32 (float64 if the input is) and in the log domain: no overflow at temperature 0.04.
    Communication: per iteration two all-reduces of [prototypes] over ``group`` (maximum, sum), none
    when it is None. A rank without rows must still call.

    Source: DINOv3 report, section 3.1 (Sinkhorn-Knopp in place of centring); Cuturi 2013.
    """
    dtype = torch.float64 if bottleneck.dtype == torch.float64 else torch.float32
    log_rows = torch.zeros(bottleneck.shape[0], dtype=dtype, device=bottleneck.device)
    log_columns = torch.zeros(prototypes.shape[0], dtype=dtype, device=bottleneck.device)
    for iteration in range(ITERATIONS):
        peak = torch.full_like(log_columns, -torch.inf)
        total = torch.zeros_like(log_columns)
        for start in range(0, bottleneck.shape[0], ROWS_AT_ONCE):
            chunk = slice(start, start + ROWS_AT_ONCE)
            logits = (bottleneck[chunk] @ prototypes.T).to(dtype).mul_(1.0 / temperature)
            if iteration > 0:
                log_rows[chunk] = -torch.logsumexp(logits + log_columns, dim=1)
            logits.add_(log_rows[chunk, None])
            new_peak = torch.maximum(peak, logits.amax(dim=0))
            total = total * (peak - new_peak).exp() + logits.sub_(new_peak).exp_().sum(dim=0)
            peak = new_peak
        log_columns = -_log_total_over_group(peak, total, group)
    for start in range(0, bottleneck.shape[0], ROWS_AT_ONCE):
        chunk = slice(start, start + ROWS_AT_ONCE)
        logits = (bottleneck[chunk] @ prototypes.T).to(dtype).mul_(1.0 / temperature)
        log_rows[chunk] = -torch.logsumexp(logits + log_columns, dim=1)
    return SoftAssignment(bottleneck, prototypes, log_rows, log_columns, temperature)


def _log_total_over_group(
    peak: Float[Tensor, " prototypes"],
    total: Float[Tensor, " prototypes"],
    group: dist.ProcessGroup | None,
) -> Float[Tensor, " prototypes"]:
    """Logarithm of ``total * exp(peak)`` summed over the ranks of the group."""
    if group is None or dist.get_world_size(group) == 1:
        return peak + total.log()
    highest = peak.clone()
    with waiting_for_peers(peak.device):
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    total = total * (peak - highest).exp()
    with waiting_for_peers(peak.device):
        dist.all_reduce(total, group=group)
    return highest + total.log()


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


class Prototypes(nn.Module):
    """The last layer of a head, and the cross-entropy taken against it.

    The loss is this module's forward so that a sharding engine gathers the weight around it.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.prototypes, shape.bottleneck))

    def forward(
        self,
        student: Float[Tensor, "crops rows bottleneck"],
        assignment: SoftAssignment,
        mixture: Float[Tensor, "crops targets"],
        weights: Float[Tensor, " rows"],
    ) -> Float[Tensor, ""]:
        """Weighted sum of cross-entropies to the assignment; see ``cross_entropy``."""
        return cross_entropy(student, self.weight, assignment, mixture, weights)


class Head(nn.Module):
    """Three-layer MLP with GELU onto the unit sphere of the bottleneck, and its prototypes.

    Source: DINOv3 report, Table 2 (8192-8192-512 for DINO, 8192-8192-384 for iBOT).
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.shape = shape
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, shape.hidden),
            nn.GELU(),
            nn.Linear(shape.hidden, shape.hidden),
            nn.GELU(),
            nn.Linear(shape.hidden, shape.bottleneck),
        )
        self.prototypes = Prototypes(shape)

    def forward(self, tokens: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows bottleneck"]:
        """The L2-normalised bottleneck of each token."""
        projected = self.mlp(tokens)
        return F.normalize(projected.float(), dim=-1, eps=NORM_EPS).to(projected.dtype)

    def cross_entropy(
        self,
        tokens: Float[Tensor, "crops rows width"],
        assignment: SoftAssignment,
        mixture: Float[Tensor, "crops targets"],
        weights: Float[Tensor, " rows"],
    ) -> Float[Tensor, ""]:
        """Compares the bottleneck of tokens with an assignment; see ``cross_entropy``."""
        loss: Tensor = self.prototypes(self(tokens), assignment, mixture, weights)
        return loss


def init_head_(head: Head, generator: torch.Generator) -> None:
    """Draws the head's weights: matrices as in ``teacher.init``, prototypes normal with unit length on average.

    Unit length is DINOv2's weight-normalised layer at its start. The released 0.02 gives a length
    of 0.45 for a bottleneck of 512 but 0.23 for one of 128, whose targets stay flat for hundreds of
    steps; unit length does not depend on the width.
    """
    for module in head.mlp:
        if isinstance(module, nn.Linear):
            init_matrix_(module, generator)
    fill_random_(head.prototypes.weight, nn.init.normal_, head.shape.bottleneck**-0.5, generator)
