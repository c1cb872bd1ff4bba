"""The DINO and iBOT heads: an MLP to an L2-normalised bottleneck, then prototypes.

A head is two modules because two different things are done with it: everybody computes the
bottleneck, which is small and travels between ranks; only a task compares it with its
prototypes, inside the loss.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from teacher.init import init_matrix_
from teacher.losses import cross_entropy
from teacher.shapes import HeadShape
from teacher.sinkhorn import SoftAssignment

NORM_EPS = 1e-6  # fp32 and bf16; an all-zero projection stays finite


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
        """Weighted sum of cross-entropies to the assignment; see ``teacher.losses.cross_entropy``."""
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


def init_head_(head: Head, generator: torch.Generator) -> None:
    """Draws the head's weights: matrices as in ``teacher.init``, prototypes normal with unit length on average.

    Unit length is DINOv2's weight-normalised layer at its start. The released 0.02 gives a length
    of 0.45 for a bottleneck of 512 but 0.23 for one of 128, whose targets stay flat for hundreds of
    steps; unit length does not depend on the width.
    """
    for module in head.mlp:
        if isinstance(module, nn.Linear):
            init_matrix_(module, generator)
    nn.init.normal_(head.prototypes.weight, std=head.shape.bottleneck**-0.5, generator=generator)
