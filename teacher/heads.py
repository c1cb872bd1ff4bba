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
mixture of assignments. How Sinkhorn and it go through the logits is in ``teacher.chunks``.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from teacher.chunks import AS_WRITTEN, LogitSteps, SoftAssignment
from teacher.init import fill_random_, init_matrix_
from teacher.peers import waiting_for_peers
from teacher.shapes import HeadShape

ITERATIONS = 3
NORM_EPS = 1e-6  # fp32 and bf16; an all-zero projection stays finite


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


def cross_entropy(
    student: Float[Tensor, "crops rows bottleneck"],
    prototypes: Float[Tensor, "prototypes bottleneck"],
    assignment: SoftAssignment,
    mixture: Float[Tensor, "crops targets"],
    weights: Float[Tensor, " rows"],
    steps: LogitSteps = AS_WRITTEN,
) -> Float[Tensor, ""]:
    """Weighted sum of cross-entropies between student crops and the teacher targets they are paired with.

    for each student crop c, target crop t, row n:
        loss -= mixture[c, t] * weights[n] * sum_k p[t, n, k] * log_softmax(student[c, n] .
        prototypes / 0.1)[k]

    The assignment's rows are ordered target crop first: [targets * rows]. fp32 inside (float64 if
    the assignment is). Gradients go to ``student`` and ``prototypes`` only. No communication.

    Source: DINOv3 report, section 3.1; Caron et al. 2021, equation 3.
    """
    return steps.cross_entropy(student, prototypes, assignment, mixture, weights)


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
