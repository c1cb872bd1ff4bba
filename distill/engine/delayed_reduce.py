"""What all ranks agree on without anyone waiting: numbers are handed in at one step and read some steps later.

A blocking all-reduce over the world would be a barrier: the rank furthest ahead would wait for the
one furthest behind and lose its lead, which is the buffer that look-ahead gives it. Started early
and read ``delay`` steps later, when every rank that is within the look-ahead has handed in, it costs
nothing. Reading at a fixed later step, not when it happens to be there, keeps all ranks at one decision.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist


class DelayedAllReduce:
    """One vote at a time over a group of CPU tensors (gloo): cast at a step, counted ``delay`` steps later.

    ``due_step``: where an open vote is to be counted; None when none is open. Every rank casts at the same steps, as many numbers, with the same operation.
    """

    def __init__(self, group: dist.ProcessGroup, delay: int) -> None:
        self._group, self._delay = group, delay
        self._started_at = 0
        self.due_step: int | None = None
        self._votes: torch.Tensor | None = None
        self._work: dist.Work | None = None

    @property
    def started_at(self) -> int:
        """The step at which the last vote was cast."""
        return self._started_at

    def start(self, step: int, votes: torch.Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Hands in this rank's numbers, any CPU tensor. Communication: one all-reduce, not waited for."""
        assert self.due_step is None, "one vote at a time"
        self._started_at, self.due_step, self._votes = step, step + self._delay, votes
        self._work = dist.all_reduce(votes, op=op, group=self._group, async_op=True)

    def is_due(self, step: int) -> bool:
        """An open vote is to be counted at this step."""
        return self.due_step is not None and step >= self.due_step

    def result(self) -> torch.Tensor:
        """The reduced numbers of the open vote; waits for ranks that have not cast theirs."""
        assert self._work is not None and self._votes is not None, "nothing was cast"
        self._work.wait()
        self._work = self.due_step = None
        return self._votes


def gather_rows(row: Sequence[float], rank: int, num_ranks: int) -> torch.Tensor:
    """A rank's row in a matrix of zeros, float64: the sum over ranks gathers all rows exactly."""
    rows = torch.zeros(num_ranks, len(row), dtype=torch.float64)
    rows[rank] = torch.tensor(row, dtype=torch.float64)
    return rows
