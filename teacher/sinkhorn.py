"""Sinkhorn-Knopp assignment of features to prototypes, kept as two vectors instead of a [rows, prototypes] matrix.

The assignment factors: ``p[n, k] = exp(x_n . v_k / temperature + log_rows[n] + log_columns[k])``.
So three iterations need only one pass over the logits each, in chunks of rows, and what remains is
one number per row and one per prototype. The caller that uses ``p`` rebuilds the chunk at hand from the
bottleneck (512 numbers a row, against 262,144 logits).
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

ITERATIONS = 3
ROWS_AT_ONCE = 256  # a chunk of logits is [256, prototypes]: 256 MiB in fp32 for 262,144 prototypes


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
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    total = total * (peak - highest).exp()
    dist.all_reduce(total, group=group)
    return highest + total.log()
