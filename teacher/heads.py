"""The DINO and iBOT heads: an MLP to an L2-normalised bottleneck, prototypes, and what both are for.

A head is two modules because two different things are done with it: everybody computes the
bottleneck, which is small and travels between ranks; only a task compares it with its
prototypes, inside the loss.

DINO and iBOT are one function: cross-entropy between a student's softmax over prototypes and a
mixture of Sinkhorn's assignments. How both go through the logits is in ``teacher.chunks``.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from teacher.chunks import AS_WRITTEN, LogitSteps, Prototypes, SoftAssignment
from teacher.init import fill_random_, init_matrix_
from teacher.shapes import HeadShape

NORM_EPS = 1e-6  # fp32 and bf16; an all-zero projection stays finite


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
