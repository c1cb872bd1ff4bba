"""Kernels without logits equal the chunks; they run in a process of its own, in Triton's interpreter (``tests.support.kernels``)."""

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.engine.logit_kernels import LIMIT
from teacher.chunks import AS_WRITTEN, sinkhorn
from teacher.heads import cross_entropy
from teacher.kernels import OPERATORS, PROGRAMS, TILINGS, KernelSteps, shape_of, shares_of
from tests.support.jobs import ENVIRONMENT

ROOT = Path(__file__).parents[2]
META = torch.device("meta")
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # that a program can have
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)


@cache
def facts_of(*words: str) -> dict[str, Any]:
    environment = {
        **ENVIRONMENT,
        "TRITON_INTERPRET": "1" if words[0] in ("loops", "values") else "0",
    }
    command = [sys.executable, "-m", "tests.support.kernels", *words]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", ["ten crops, two targets", "masked patches", "one row"])
def test_kernels__equal_float64(case: str) -> None:
    """Sizes divide no tile. In bf16 Sinkhorn is as good as in fp32; weights of the sums are rounded."""
    facts = facts_of("values")
    assert max(facts[f"{case}, float32"].values()) < 1e-5
    found = facts[f"{case}, bfloat16"]
    assert found["log_rows"] < 1e-6 and found["log_columns"] < 1e-6
    assert found["loss"] < 1e-4
    assert found["by_student"] < 8e-3 and found["by_prototypes"] < 1e-2


@needs_triton
def test_kernels__equal_the_nested_loops() -> None:
    facts = facts_of("loops")
    assert max(facts[name] for name in facts if name != "trial") < 1e-6


@needs_triton
def test_trial__kernels_in_bf16_are_far_from_its_limit() -> None:
    assert 0.0 < facts_of("loops")["trial"] < LIMIT / 3


@needs_triton
@pytest.mark.slow
def test_kernels__gradients_near_the_targets_are_no_worse_than_those_of_chunks() -> None:
    """There they are a small difference of two means, of which each is rounded."""
    facts = facts_of("values")["near its targets"]
    for name in ("by_student", "by_prototypes"):
        assert facts[name] < 1.1 * facts[f"chunked_{name}"]


@needs_triton
@pytest.mark.slow
def test_kernels__keep_what_they_claim() -> None:
    claims = facts_of("values")["claims"]
    assert len(claims) == 4 and all(claims.values()), claims


@needs_triton
def test_kernels__compile_for_two_generations_of_gpus() -> None:
    facts = facts_of("compiled", "64")
    assert len(facts) == 2 * 5
    for size in facts.values():
        assert size["registers"] <= 128 and size["spilled"] == 0 and size["shared"] < 32_768


@needs_triton
@pytest.mark.slow
def test_kernels__of_the_widest_heads_fit_on_a_gpu() -> None:
    """The released heads' bottlenecks: one program of 256 threads has all registers of a processor."""
    for name, size in facts_of("compiled", "384", "512").items():
        assert size["shared"] <= SHARED_MEMORY[name.split(", ")[-1]], name
        assert size["spilled"] <= 160, name


@needs_triton
def test_kernels__are_made_once_for_all_numbers_of_rows() -> None:
    """Log sums with and without factors, student and teacher; a step with other numbers of masked patches compiles nothing."""
    assert facts_of("launched") == {"gather": [4, 4], "merge": [3, 3], "scatter": [1, 1]}


def test_kernel_steps__leave_other_inputs_to_the_chunks() -> None:
    """fp32, no rows, and bottlenecks wider than 512."""
    steps = KernelSteps(AS_WRITTEN)
    draw = torch.Generator().manual_seed(0)
    rows, prototypes = torch.randn(6, 8, generator=draw), torch.randn(9, 8, generator=draw)
    wide = torch.zeros(3, 520, dtype=torch.bfloat16)
    for bottleneck, columns in ((rows, prototypes), (rows[:0].bfloat16(), prototypes.bfloat16())):
        found, expected = (
            sinkhorn(bottleneck, columns, 0.07, None, each) for each in (steps, AS_WRITTEN)
        )
        assert torch.equal(found.log_rows, expected.log_rows)
        assert torch.equal(found.log_columns, expected.log_columns)
    assert steps.rows(wide, wide, torch.zeros(3), 0.07).shape == (3,)
    assignment = sinkhorn(rows, prototypes, 0.07)
    student, weights = rows.view(1, 6, 8), torch.ones(6)
    losses = [
        cross_entropy(student, prototypes, assignment, torch.ones(1, 1), weights, each)
        for each in (steps, AS_WRITTEN)
    ]
    assert torch.equal(*losses)


def test_kernel_steps__can_be_counted_on_the_meta_device() -> None:
    """Gradients have the shapes of what they belong to, and nothing is as large as the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            made = function(*args, **(kwargs or {}))
            sizes.extend(
                each.numel() for each in tree_leaves(made) if isinstance(each, torch.Tensor)
            )
            return made

    crops, rows, width, columns = 10, 64, 32, 65_536

    def bf16(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device=META)

    steps = KernelSteps(AS_WRITTEN)
    student, prototypes = bf16(crops, rows, width), bf16(columns, width)
    student.requires_grad_(), prototypes.requires_grad_()
    mixture, weights = torch.empty(crops, 2, device=META), torch.empty(rows, device=META)
    with Sizes():
        assignment = sinkhorn(bf16(2 * rows, 48), bf16(columns, 48), 0.04, None, steps)
        loss = cross_entropy(student, prototypes, assignment, mixture, weights, steps)
        loss.backward()
    assert loss.shape == () and assignment.log_columns.shape == (columns,)
    assert student.grad is not None and student.grad.shape == student.shape
    assert prototypes.grad is not None and prototypes.grad.dtype == torch.bfloat16
    assert max(sizes) <= 48 * columns < rows * columns


def test_operators__flops_are_those_of_their_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    rows, keys, values = (
        torch.empty(n, w, dtype=torch.bfloat16, device=META)
        for n, w in ((7, 16), (50, 16), (50, 24))
    )
    bias = torch.empty(50, device=META)
    with FlopCounterMode(display=False) as counter:
        OPERATORS.gather_tiles(rows, keys, None, None, bias, 1.0, False)
    assert counter.get_total_flops() == 2 * 7 * 50 * 16
    with FlopCounterMode(display=False) as counter:
        OPERATORS.gather_tiles(rows, keys, values, bias[:7], bias, 1.0, True)
    assert counter.get_total_flops() == 2 * 7 * 50 * (16 + 24)


@pytest.mark.parametrize(
    ("width", "shape"),
    [
        (512, (512, 512, 0)),
        (384, (384, 256, 128)),
        (6, (6, 16, 0)),
        (40, (40, 32, 16)),
        (33, (33, 32, 16)),
    ],
)
def test_shape_of__covers_the_width_by_two_powers_of_two(
    width: int, shape: tuple[int, ...]
) -> None:
    assert shape_of(width) == shape


@pytest.mark.parametrize("num_rows", [1, 160, 20_000, 262_144])
@pytest.mark.parametrize("num_keys", [1, 33, 98_304, 262_144])
def test_shares_of__cover_the_keys_and_none_is_empty(num_rows: int, num_keys: int) -> None:
    tiling = TILINGS[torch.bfloat16]
    share, count = shares_of(num_rows, num_keys, tiling)
    assert share * (count - 1) < num_keys <= share * count
    assert count * -(-num_rows // tiling.block) <= max(PROGRAMS, -(-num_rows // tiling.block))
