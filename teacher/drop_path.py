"""Stochastic depth: in training each row skips each residual branch with some probability.

A skipped row is not computed: the branch sees only the rows that are kept, and what it adds is
divided by the probability of being kept. Which rows are kept is decided outside, from sample ids, so
that it does not depend on how a batch is divided.

Source: Huang et al. 2016 (stochastic depth); rows instead of masks as in DINOv2, appendix.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from teacher.batch import onto

BRANCHES = 2  # of a block: attention, feed-forward


@dataclass(frozen=True)
class ActiveRows:
    """Rows that pass through each branch, block by block; ``scale`` multiplies what a branch adds."""

    rows: tuple[Int64[Tensor, " _"], ...]
    scale: float

    def add(
        self,
        tokens: Float[Tensor, "rows tokens embed"],
        branch: Callable[[Tensor], Tensor],
        index: int,
    ) -> Float[Tensor, "rows tokens embed"]:
        """``tokens`` plus what branch ``index`` (counted over all blocks) makes of its rows."""
        rows = self.rows[index]
        added = branch(tokens.index_select(0, rows))
        return tokens.index_add(0, rows, added, alpha=self.scale)


def active_rows(
    flags: Bool[Tensor, "images crops blocks 2"], probability: float, device: torch.device
) -> ActiveRows:
    """Indices of the kept rows (image-major, then crop), on ``device``.

    ``flags`` lie on the host, so that no rank waits for a device to count; ``probability`` is that of
    being kept.
    """
    by_branch = flags.flatten(0, 1).flatten(1).T  # [blocks * 2, rows]
    rows = onto(by_branch.nonzero()[:, 1], device)
    return ActiveRows(rows.split(by_branch.sum(dim=1).tolist()), 1.0 / probability)
