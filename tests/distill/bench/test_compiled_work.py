"""Parts are noted as they are called. What a compiler makes of them: ``test_budget``, in a process of its own."""

from functools import partial
from typing import Any

import pytest
import torch

from distill.bench.compiled_work import Parts, as_written
from distill.bench.trace import count
from students.student import build_empty
from teacher.chunks import AS_WRITTEN, sinkhorn
from teacher.heads import cross_entropy
from teacher.shapes import ViTSpec

META = torch.device("meta")
SPEC = ViTSpec(width=32, depth=3, heads=2, ffn_width=64, patch=8)


def pixels(size: int) -> torch.Tensor:
    return torch.empty(2, 3, size, size, device=META)


def test_parts__blocks_of_one_shape_are_one_part() -> None:
    network: Any = build_empty(SPEC.build, META)
    parts = Parts(network)
    for size in (32, 32, 16):
        network(pixels(size))
    assert [part.calls for part in parts.take()] == [6, 3]
    with torch.no_grad():
        network(pixels(16))
    (part,) = parts.take()
    assert part.calls == 3 and not part.trains and not parts.take()


def test_as_written__of_all_parts_is_what_the_network_takes_in_its_blocks() -> None:
    """A network with one block more takes one call of the part more, forward and backward."""
    deeper: Any = build_empty(ViTSpec(32, 4, 2, 64, patch=8).build, META)
    network: Any = build_empty(SPEC.build, META)
    (part,) = noted(network)
    found = as_written(part)
    passes = []
    for each in (network, deeper):
        forward, made = count(lambda e=each: e(pixels(32)))  # type: ignore[misc]
        backward, _ = count(made.class_token.sum().backward)
        passes.append((forward, backward))
    assert passes[1][0].minus(passes[0][0]) == found.forward
    assert passes[1][1].minus(passes[0][1]).matmuls == found.backward.matmuls
    assert passes[1][1].minus(passes[0][1]).flops == found.backward.flops


def noted(network: Any) -> list[Any]:
    parts = Parts(network)
    network(pixels(32))
    return parts.take()


def test_parts__of_sinkhorn_are_full_chunks_of_rows() -> None:
    parts = Parts(torch.nn.Module())
    rows, prototypes = torch.empty(600, 8, device=META), torch.empty(40, 8, device=META)
    sinkhorn(rows, prototypes, 0.07, None, parts.steps())
    calls = {part.function: 0 for part in parts.take()}
    assert calls.keys() == {AS_WRITTEN.balance_columns, AS_WRITTEN.balance_rows}


def test_kernels__of_the_released_heads_keep_within_sixty_launches_and_400_mb() -> None:
    """Sinkhorn and both losses of 16 images, with the bytes of the kernels themselves; in chunks 3,902 launches and 4,500 MB."""

    def bf16(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device=META)

    images, launches, size = 16, 0, 0
    steps = Parts(torch.nn.Module()).steps()
    for crops, rows, targets, columns, width in (
        (10, images, 2, 262_144, 512),
        (1, 77 * images, 1, 98_304, 384),
    ):
        student, weight = bf16(crops, rows, width), bf16(columns, width)
        student.requires_grad_(), weight.requires_grad_()
        bottleneck, prototypes = bf16(targets * rows, width), bf16(columns, width)
        factors = torch.empty(crops, targets, device=META), torch.empty(rows, device=META)
        balanced, found = count(partial(sinkhorn, bottleneck, prototypes, 0.07, None, steps))
        forward, loss = count(partial(cross_entropy, student, weight, found, *factors, steps))
        backward, _ = count(loss.backward)
        launches += forward.launches + backward.launches
        size += sum(each.other_bytes + each.matmul_bytes for each in (balanced, forward, backward))
    assert launches <= 60
    assert size <= 400e6 * images


def test_bench_step__compiled_without_a_compiler_is_one_line(
    distill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    ended = distill("bench", "step", "bench_cpu", "--ranks", "2", "--compiled")
    assert ended.code == 3 and not ended.out
    assert "--compiled: there is no C++ compiler" in ended.err
    assert len(ended.err.strip().splitlines()) == 2
