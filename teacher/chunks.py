"""Sinkhorn's assignment, and its and the cross-entropy's work on logits, chunk by chunk.

Targets are Sinkhorn-Knopp assignments of features to prototypes, kept as two vectors instead of a
[rows, prototypes] matrix. The assignment factors:
``p[n, k] = exp(x_n . v_k / temperature + log_rows[n] + log_columns[k])``. So three iterations need
only one pass over the logits each, in chunks of rows, and what remains is one number per row and one
per prototype. The caller that uses ``p`` rebuilds the chunk at hand from the bottleneck (512 numbers a
row, against 262,144 logits).

Sinkhorn walks over rows in chunks, the cross-entropy over prototypes with a running log-sum-exp; it recomputes the
chunk in the backward pass, so memory is [rows, chunk] and never [rows, prototypes] (six matrix products instead of
four; exact).

What is done with one chunk is a function of tensors alone (``ChunkSteps``), so that a compiler can take
it: memory stays that of a chunk, and no number of a step is a constant of the code it makes. Compiled
steps get few shapes: rows of the cross-entropy are padded by ones that weigh nothing, and in Sinkhorn the last
rows, which are no full chunk, are worked on as written.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from teacher.peers import waiting_for_peers
from teacher.shapes import PROTOTYPES_AT_ONCE, HeadShape

ROWS_AT_ONCE = 256  # a chunk of logits is [256, prototypes]: 256 MiB in fp32 for 262,144 prototypes
STUDENT_TEMPERATURE = 0.1
ITERATIONS = 3


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
) -> tuple[Tensor, Tensor]:
    """One chunk of rows in one iteration of Sinkhorn: peak and total of each column so far."""
    peak, total = sums
    logits = (bottleneck @ prototypes.T).to(peak.dtype).mul_(sharpness)
    if log_columns is not None:
        log_rows = -torch.logsumexp(logits + log_columns, dim=1)
        logits.add_(log_rows[:, None])
    new_peak = torch.maximum(peak, logits.amax(dim=0))
    total = total * (peak - new_peak).exp() + logits.sub_(new_peak).exp_().sum(dim=0)
    return new_peak, total


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


@runtime_checkable
class LogitSteps(Protocol):
    """How Sinkhorn and the cross-entropy go through the logits: in chunks, or with kernels that keep none (``teacher.kernels``). No communication."""

    def columns(
        self,
        bottleneck: Float[Tensor, "rows bottleneck"],
        prototypes: Float[Tensor, "prototypes bottleneck"],
        log_columns: Float[Tensor, " prototypes"] | None,
        temperature: float,
    ) -> tuple[Float[Tensor, " prototypes"], Float[Tensor, " prototypes"]]:
        """Peak and total of each column, ``total * exp(peak)``, once the rows are balanced to ``log_columns``; of plain logits when that is None. fp32 or float64; -inf and 0 without rows."""

    def rows(
        self,
        bottleneck: Float[Tensor, "rows bottleneck"],
        prototypes: Float[Tensor, "prototypes bottleneck"],
        log_columns: Float[Tensor, " prototypes"],
        temperature: float,
    ) -> Float[Tensor, " rows"]:
        """The log factors of the rows at these log factors of the columns."""

    def cross_entropy(
        self,
        student: Float[Tensor, "crops rows bottleneck"],
        prototypes: Float[Tensor, "prototypes bottleneck"],
        assignment: SoftAssignment,
        mixture: Float[Tensor, "crops targets"],
        weights: Float[Tensor, " rows"],
    ) -> Float[Tensor, ""]:
        """As ``teacher.heads.cross_entropy``."""


@dataclass(frozen=True)
class ChunkSteps:
    """What is done with one chunk of logits, as written above or as a compiler made it: two steps of Sinkhorn, two of the cross-entropy."""

    balance_columns: Callable[..., tuple[Tensor, Tensor]] = _balance_columns
    balance_rows: Callable[..., Tensor] = _balance_rows
    add_to_sums: Callable[..., Sums] = _add_to_sums
    differentiate: Callable[..., tuple[Tensor, Tensor]] = _differentiate

    def columns(
        self,
        bottleneck: Float[Tensor, "rows bottleneck"],
        prototypes: Float[Tensor, "prototypes bottleneck"],
        log_columns: Float[Tensor, " prototypes"] | None,
        temperature: float,
    ) -> tuple[Float[Tensor, " prototypes"], Float[Tensor, " prototypes"]]:
        """As ``LogitSteps``, in one pass: the rows of a chunk are balanced on the way."""
        zeros = _factor_zeros(prototypes)
        sharpness = zeros.new_full((), 1.0 / temperature)
        peak, total = torch.full_like(zeros, -torch.inf), zeros
        for start in range(0, len(bottleneck), ROWS_AT_ONCE):
            rows = bottleneck[start : start + ROWS_AT_ONCE]
            balance = self._for_rows(len(rows)).balance_columns
            peak, total = balance(rows, prototypes, log_columns, sharpness, (peak, total))
        return peak, total

    def rows(
        self,
        bottleneck: Float[Tensor, "rows bottleneck"],
        prototypes: Float[Tensor, "prototypes bottleneck"],
        log_columns: Float[Tensor, " prototypes"],
        temperature: float,
    ) -> Float[Tensor, " rows"]:
        """As ``LogitSteps``."""
        log_rows = _factor_zeros(bottleneck)
        sharpness = log_rows.new_full((), 1.0 / temperature)
        for start in range(0, len(bottleneck), ROWS_AT_ONCE):
            rows = bottleneck[start : start + ROWS_AT_ONCE]
            balance = self._for_rows(len(rows)).balance_rows
            log_rows[start : start + len(rows)] = balance(rows, prototypes, log_columns, sharpness)
        return log_rows

    def cross_entropy(
        self,
        student: Float[Tensor, "crops rows bottleneck"],
        prototypes: Float[Tensor, "prototypes bottleneck"],
        assignment: SoftAssignment,
        mixture: Float[Tensor, "crops targets"],
        weights: Float[Tensor, " rows"],
    ) -> Float[Tensor, ""]:
        """As ``LogitSteps``."""
        steps = self if student.shape[1] else AS_WRITTEN
        if steps is not AS_WRITTEN:
            student, assignment, weights = _padded(student, assignment, weights)
        loss: Tensor = PrototypeCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch leaves it untyped
            student, prototypes, assignment, mixture, weights, steps
        )
        return loss

    def _for_rows(self, count: int) -> "ChunkSteps":
        """The steps of Sinkhorn for a chunk of so many rows."""
        return self if count == ROWS_AT_ONCE else AS_WRITTEN


def _factor_zeros(rows: Tensor) -> Tensor:
    """A zero for each row in the dtype of log factors: fp32, or float64 as the row."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return torch.zeros(rows.shape[0], dtype=dtype, device=rows.device)


AS_WRITTEN = ChunkSteps()


@torch.no_grad()
def sinkhorn(
    bottleneck: Float[Tensor, "rows bottleneck"],
    prototypes: Float[Tensor, "prototypes bottleneck"],
    temperature: float,
    group: dist.ProcessGroup | None = None,
    steps: LogitSteps = AS_WRITTEN,
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
    log_columns = None
    for _ in range(ITERATIONS):
        peak, total = steps.columns(bottleneck, prototypes, log_columns, temperature)
        log_columns = -_log_total_over_group(peak, total, group)
    assert log_columns is not None
    log_rows = steps.rows(bottleneck, prototypes, log_columns, temperature)
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


class Prototypes(nn.Module):
    """The last layer of a head, and the cross-entropy taken against it.

    The loss is this module's forward so that a sharding engine gathers the weight around it.
    """

    def __init__(self, shape: HeadShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.prototypes, shape.bottleneck))
        self.steps: LogitSteps = AS_WRITTEN

    def use_steps(self, steps: LogitSteps) -> None:
        """From now on logits are worked on in this way."""
        self.steps = steps

    def forward(
        self,
        student: Float[Tensor, "crops rows bottleneck"],
        assignment: SoftAssignment,
        mixture: Float[Tensor, "crops targets"],
        weights: Float[Tensor, " rows"],
    ) -> Float[Tensor, ""]:
        """Weighted sum of cross-entropies to the assignment; see ``teacher.heads.cross_entropy``."""
        return self.steps.cross_entropy(student, self.weight, assignment, mixture, weights)


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
