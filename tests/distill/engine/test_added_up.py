"""A step's micro-batches on two ranks: what is reduced, and how exactly they add up."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.engine.config import EngineSettings
from distill.engine.engine import Engine, StepRates, prepare_deepspeed
from tests.support.spawn import on_ranks

ROWS, COLUMNS = 64, 48
FIRST, LATER = 1.0, 1 / 512  # added to 1 in bf16, the later ones round away
CASES = (("fp32", 3), ("bf16", 1), ("bf16", 3), ("bf16", 32))


class Reduced(TorchDispatchMode):
    """Counts the bytes of gradients that are handed to all-reduces; a step's other ones are of a few numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = Counter[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        if name.startswith("c10d.allreduce"):
            tensors = [each for each in tree_leaves(args) if isinstance(each, torch.Tensor)]
            self.bytes[str(tensors[0].dtype)] += sum(t.nbytes for t in tensors if t.numel() > 1)
        return function(*args, **(kwargs or {}))


def step(precision: str, num_parts: int) -> tuple[dict[str, int], float]:
    """Bytes reduced in a step, and its gradient's norm."""
    prepare_deepspeed("cpu")
    world, rank = dist.group.WORLD, dist.get_rank()
    assert world is not None
    alone = [dist.new_group([each]) for each in range(dist.get_world_size())][rank]
    settings = EngineSettings(1, precision, math.inf, 1, num_parts)
    engine = Engine(nn.Linear(COLUMNS, ROWS, bias=False), world, alone, settings)
    ones = torch.ones(1, COLUMNS, dtype=torch.bfloat16 if precision == "bf16" else None)
    with Reduced() as reduced:
        for part in range(num_parts):
            loss = engine.forward(ones).float().sum() * (LATER if part else FIRST)
            engine.backward_and_step(loss, StepRates(1e-3, 1e-3, 0.0, 0.9))
    assert bool(engine.is_applied)
    return dict(reduced.bytes), float(engine.grad_norm)


def steps() -> list[tuple[dict[str, int], float]]:
    return [step(*case) for case in CASES]


@pytest.mark.slow
def test_engine__reduces_a_network_once_a_step_and_adds_up_in_fp32() -> None:
    for (precision, parts), (reduced, norm) in zip(CASES, on_ranks(2, steps)[0], strict=True):
        number = 2 if precision == "bf16" else 4
        assert sum(reduced.values()) == ROWS * COLUMNS * number, (precision, parts, reduced)
        expected = (FIRST + (parts - 1) * LATER) * math.sqrt(ROWS * COLUMNS)
        assert norm == pytest.approx(expected, rel=1e-6 if precision == "fp32" else 2**-8)
