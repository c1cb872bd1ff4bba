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

What is done with one chunk is a function of tensors alone (``ChunkSteps``), so that a compiler can take
it: memory stays that of a chunk, and no number of a step is a constant of the code it makes. Compiled
steps get few shapes: rows of the cross-entropy are padded by ones that weigh nothing, and in Sinkhorn the last
rows, which are no full chunk, are worked on as written.
"""

from collections.abc import Callable
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
        return _assigned(self.factors(start, stop, self.sharpness()))

    def sharpness(self) -> Float[Tensor, ""]:
        """1 / temperature, where the factors are."""
        return self.log_rows.new_full((), 1.0 / self.temperature)

    def factors(self, start: int, stop: int, sharpness: Float[Tensor, ""]) -> "Factors":
        """What ``p[:, start:stop]`` is made of: views."""
        prototypes, log_columns = self.prototypes[start:stop], self.log_columns[start:stop]
        return self.bottleneck, prototypes, self.log_rows, log_columns, sharpness


Factors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Sums = tuple[Tensor, Tensor, Tensor, Tensor]  # of each row so far: peak, total, mass, dot


def _assigned(factors: Factors) -> Tensor:
    bottleneck, prototypes, log_rows, log_columns, sharpness = factors
    logits = (bottleneck @ prototypes.T).to(log_rows.dtype).mul_(sharpness)
    return logits.add_(log_rows[:, None]).add_(log_columns).exp_()


def _balance_columns(
    bottleneck: Tensor,
    prototypes: Tensor,
    log_columns: Tensor | None,
    sharpness: Tensor,
    sums: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One chunk of rows in one iteration of Sinkhorn: their log factors, and peak and total of each column so far."""
    peak, total = sums
    logits = (bottleneck @ prototypes.T).to(peak.dtype).mul_(sharpness)
    if log_columns is None:
        log_rows = torch.zeros(bottleneck.shape[0], dtype=peak.dtype, device=peak.device)
    else:
        log_rows = -torch.logsumexp(logits + log_columns, dim=1)
    logits.add_(log_rows[:, None])
    new_peak = torch.maximum(peak, logits.amax(dim=0))
    total = total * (peak - new_peak).exp() + logits.sub_(new_peak).exp_().sum(dim=0)
    return log_rows, new_peak, total


def _balance_rows(
    bottleneck: Tensor, prototypes: Tensor, log_columns: Tensor, sharpness: Tensor
) -> Tensor:
    """The log factors of one chunk of rows."""
    logits = (bottleneck @ prototypes.T).to(log_columns.dtype).mul_(sharpness)
    return -torch.logsumexp(logits + log_columns, dim=1)


def _add_to_sums(
    student: Tensor, prototypes: Tensor, factors: Factors, mixture: Tensor, sums: Sums
) -> Sums:
    """One chunk of prototypes in the forward pass of the cross-entropy."""
    peak, total, mass, dot = sums
    logits, target = _logits_and_target(student, prototypes, factors, mixture)
    mass = mass + target.sum(dim=-1)
    dot = dot + (target * logits).sum(dim=-1)
    new_peak = torch.maximum(peak, logits.amax(dim=-1))
    chunk_total = logits.sub_(new_peak[..., None]).exp_().sum(dim=-1)
    return new_peak, total * (peak - new_peak).exp() + chunk_total, mass, dot


def _differentiate(
    student: Tensor,
    prototypes: Tensor,
    factors: Factors,
    mixture: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """One chunk of prototypes in the backward pass: its part of the student's gradient, and the gradient of the prototypes. ``rows``: log of the total, mass and factor of each row."""
    log_total, mass, scale = rows
    logits, target = _logits_and_target(student, prototypes, factors, mixture)
    softmax = logits.sub_(log_total[..., None]).exp_()
    grad_logits = softmax.mul_(mass[..., None]).sub_(target).mul_(scale).to(student.dtype)
    return grad_logits @ prototypes, grad_logits.flatten(0, 1).T @ student.flatten(0, 1)


def _logits_and_target(
    student: Tensor, prototypes: Tensor, factors: Factors, mixture: Tensor
) -> tuple[Tensor, Tensor]:
    """Student logits and mixed targets, both [crops, rows, chunk], for one chunk of prototypes."""
    dtype = factors[2].dtype
    logits = (student @ prototypes.T).to(dtype).mul_(1.0 / STUDENT_TEMPERATURE)
    per_target = _assigned(factors).view(mixture.shape[1], student.shape[1], prototypes.shape[0])
    return logits, torch.einsum("ct,tnk->cnk", mixture.to(dtype), per_target)


@dataclass(frozen=True)
class ChunkSteps:
    """What is done with one chunk of logits, as written above or as a compiler made it: two steps of Sinkhorn, two of the cross-entropy."""

    balance_columns: Callable[..., tuple[Tensor, Tensor, Tensor]] = _balance_columns
    balance_rows: Callable[..., Tensor] = _balance_rows
    add_to_sums: Callable[..., Sums] = _add_to_sums
    differentiate: Callable[..., tuple[Tensor, Tensor]] = _differentiate

    def for_rows(self, count: int) -> "ChunkSteps":
        """The steps of Sinkhorn for a chunk of so many rows."""
        return self if count == ROWS_AT_ONCE else AS_WRITTEN


AS_WRITTEN = ChunkSteps()


@torch.no_grad()
def sinkhorn(
    bottleneck: Float[Tensor, "rows bottleneck"],
    prototypes: Float[Tensor, "prototypes bottleneck"],
    temperature: float,
    group: dist.ProcessGroup | None = None,
    steps: ChunkSteps = AS_WRITTEN,
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
    log_columns = log_rows.new_zeros(prototypes.shape[0])
    sharpness = log_rows.new_full((), 1.0 / temperature)
    chunks = [
        slice(start, start + ROWS_AT_ONCE) for start in range(0, bottleneck.shape[0], ROWS_AT_ONCE)
    ]
    for iteration in range(ITERATIONS):
        peak = torch.full_like(log_columns, -torch.inf)
        total = torch.zeros_like(log_columns)
        before = log_columns if iteration else None
        for chunk in chunks:
            rows = bottleneck[chunk]
            log_rows[chunk], peak, total = steps.for_rows(len(rows)).balance_columns(
                rows, prototypes, before, sharpness, (peak, total)
            )
        log_columns = -_log_total_over_group(peak, total, group)
    for chunk in chunks:
        rows = bottleneck[chunk]
        balance = steps.for_rows(len(rows)).balance_rows
        log_rows[chunk] = balance(rows, prototypes, log_columns, sharpness)
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
        steps: ChunkSteps,
    ) -> Float[Tensor, ""]:
        dtype, sharpness = assignment.log_rows.dtype, assignment.sharpness()
        zeros = student.new_zeros(3, *student.shape[:2], dtype=dtype)
        sums = torch.full_like(zeros[0], -torch.inf), zeros[0], zeros[1], zeros[2]
        for start, stop in _chunks(prototypes):
            factors = assignment.factors(start, stop, sharpness)
            sums = steps.add_to_sums(student, prototypes[start:stop], factors, mixture, sums)
        peak, total, mass, dot = sums
        log_total = peak + total.log()
        ctx.save_for_backward(student, prototypes, mixture, weights, log_total, mass)
        ctx.assignment, ctx.steps = assignment, steps
        return (weights * (mass * log_total - dot)).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student, prototypes, mixture, weights, log_total, mass = ctx.saved_tensors
        (grad,) = grads
        scale = (weights * grad / STUDENT_TEMPERATURE)[None, :, None]
        grad_student = torch.zeros(student.shape, dtype=log_total.dtype, device=student.device)
        grad_prototypes = torch.empty_like(prototypes)
        assignment, sharpness = ctx.assignment, ctx.assignment.sharpness()
        for start, stop in _chunks(prototypes):
            factors = assignment.factors(start, stop, sharpness)
            rows = log_total, mass, scale
            part, grad_prototypes[start:stop] = ctx.steps.differentiate(
                student, prototypes[start:stop], factors, mixture, rows
            )
            grad_student += part
        return grad_student.to(student.dtype), grad_prototypes, None, None, None, None


def _chunks(prototypes: Tensor) -> list[tuple[int, int]]:
    count, most = prototypes.shape[0], PROTOTYPES_AT_ONCE
    return [(start, min(start + most, count)) for start in range(0, count, most)]


def _padded(
    student: Tensor, assignment: SoftAssignment, weights: Tensor
) -> tuple[Tensor, SoftAssignment, Tensor]:
    """The rows, and up to an eighth more that have no target and no weight: eight counts from one power of two to the next."""
    count = student.shape[1]
    step = max(1, 2 ** (count.bit_length() - 1) // 8)
    missing = -count % step
    if not missing:
        return student, assignment, weights
    num_targets = assignment.log_rows.shape[0] // count
    bottleneck = F.pad(assignment.bottleneck.unflatten(0, (num_targets, count)), (0, 0, 0, missing))
    log_rows = assignment.log_rows.unflatten(0, (num_targets, count))
    padded = replace(
        assignment,
        bottleneck=bottleneck.flatten(0, 1),
        log_rows=F.pad(log_rows, (0, missing), value=-torch.inf).flatten(0, 1),
    )
    return F.pad(student, (0, 0, 0, missing)), padded, F.pad(weights, (0, missing))


def cross_entropy(
    student: Float[Tensor, "crops rows bottleneck"],
    prototypes: Float[Tensor, "prototypes bottleneck"],
    assignment: SoftAssignment,
    mixture: Float[Tensor, "crops targets"],
    weights: Float[Tensor, " rows"],
    steps: ChunkSteps = AS_WRITTEN,
) -> Float[Tensor, ""]:
    """Weighted sum of cross-entropies between student crops and the teacher targets they are paired with.

    for each student crop c, target crop t, row n:
        loss -= mixture[c, t] * weights[n] * sum_k p[t, n, k] * log_softmax(student[c, n] .
        prototypes / 0.1)[k]

    The assignment's rows are ordered target crop first: [targets * rows]. fp32 inside (float64 if
    the assignment is). Gradients go to ``student`` and ``prototypes`` only. No communication.

    Source: DINOv3 report, section 3.1; Caron et al. 2021, equation 3.
    """
    if not student.shape[1]:
        steps = AS_WRITTEN
    if steps is not AS_WRITTEN:
        student, assignment, weights = _padded(student, assignment, weights)
    loss: Tensor = PrototypeCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
        student, prototypes, assignment, mixture, weights, steps
    )
    return loss


class Prototypes(nn.Module):
    """The last layer of a head, and the cross-entropy taken against it.

    The loss is this module's forward so that a sharding engine gathers the weight around it.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.prototypes, shape.bottleneck))
        self.steps = AS_WRITTEN

    def use_steps(self, steps: ChunkSteps) -> None:
        """From now on a chunk of logits is worked on in this way."""
        self.steps = steps

    def forward(
        self,
        student: Float[Tensor, "crops rows bottleneck"],
        assignment: SoftAssignment,
        mixture: Float[Tensor, "crops targets"],
        weights: Float[Tensor, " rows"],
    ) -> Float[Tensor, ""]:
        """Weighted sum of cross-entropies to the assignment; see ``cross_entropy``."""
        return cross_entropy(student, self.weight, assignment, mixture, weights, self.steps)


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
