"""Counts against small networks that are counted by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distill.bench.trace import Counts, count

META = torch.device("meta")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def test_count__of_a_product_and_an_addition() -> None:
    left, right = empty(8, 4), empty(4, 16)
    counted, made = count(lambda: left @ right + 1.0)
    assert made.shape == (8, 16)
    product_bytes = 2 * (8 * 4 + 4 * 16 + 8 * 16)
    assert (counted.matmuls, counted.matmul_bytes) == (1, product_bytes)
    assert (counted.others, counted.other_bytes) == (1, 2 * 2 * 8 * 16)
    assert counted.flops == 2 * 8 * 4 * 16


def test_count__of_a_linear_layer_forward_and_backward() -> None:
    with META:
        layer = nn.Linear(4, 16).to(torch.bfloat16)
    rows = empty(8, 4)
    forward, made = count(lambda: layer(rows))
    assert (forward.launches, forward.flops) == (1, 2 * 8 * 4 * 16)  # the bias is added in it
    assert forward.matmul_bytes == 2 * (8 * 4 + 4 * 16 + 16 + 8 * 16)
    backward, _ = count(lambda: made.sum().backward())
    assert backward.flops == 2 * 8 * 4 * 16  # the rows need no gradient
    # sum, its gradient of one number spread by strides, product, sum for the bias
    assert (backward.matmuls, backward.others) == (1, 3)


@pytest.mark.parametrize("view", ["transpose", "view", "expand", "slice"])
def test_count__views_cost_nothing(view: str) -> None:
    matrix = empty(8, 4)
    works = {
        "transpose": lambda: matrix.T,
        "view": lambda: matrix.view(4, 8),
        "expand": lambda: matrix[None].expand(3, -1, -1),
        "slice": lambda: matrix[2:, :1],
    }
    assert count(works[view])[0] == Counts()


def test_count__a_repeated_value_is_read_once() -> None:
    one, matrix = empty(1, 1), empty(8, 4)
    assert count(lambda: matrix * one.expand(8, 4))[0].other_bytes == 2 * (8 * 4 * 2 + 1)


def test_count__attention_is_a_flash_kernel_and_keeps_no_matrix_of_tokens() -> None:
    rows, heads, tokens, dim = 2, 4, 10, 64
    query, key, value = (empty(rows, heads, tokens, dim).requires_grad_() for _ in range(3))
    size = 2 * rows * heads * tokens * dim
    forward, made = count(lambda: F.scaled_dot_product_attention(query, key, value))
    assert forward.launches == 1 and forward.flops == 4 * rows * heads * tokens**2 * dim
    sums = 4 * rows * heads * tokens  # one number a row in fp32
    assert 0 <= forward.other_bytes - (4 * size + sums) <= 64
    grad = empty(*made.shape)
    backward, _ = count(lambda: made.backward(grad))
    assert backward.launches == 3 and backward.flops == 10 * rows * heads * tokens**2 * dim
    assert 0 <= backward.other_bytes - (8 * size + sums) <= 64


def test_count__what_is_changed_in_place_is_read_and_written() -> None:
    matrix = empty(8, 4)
    assert count(lambda: matrix.add_(1.0))[0].other_bytes == 2 * 2 * 8 * 4
    assert count(lambda: matrix.copy_(empty(8, 4)))[0].other_bytes == 2 * 2 * 8 * 4
    assert count(lambda: matrix.zero_())[0].other_bytes == 2 * 8 * 4


def test_count__tiles_that_are_not_full_take_as_long() -> None:
    """One row of 128 columns is one tile of one processor of 132."""
    left, right = empty(1, 4), empty(4, 128)
    counted, _ = count(lambda: left @ right)
    assert counted.tiled_flops == pytest.approx(counted.flops * 128 * 132)
    # the 7B's rows at two images: 66% and 88% of what the tiles of two widths can do
    for columns, fill in ((4096, 0.659), (8192, 0.879)):
        rows, weight = empty(1044, 4), empty(4, columns)
        counted, _ = count(lambda r=rows, w=weight: r @ w)  # type: ignore[misc]
        assert counted.flops / counted.tiled_flops == pytest.approx(fill, abs=0.001)


def test_counts__add_up() -> None:
    one, two = Counts(1, 2, 3.0, 4.0, 5, 6), Counts(1, 1, 1.0, 1.0, 1, 1)
    assert one.plus(two, 2) == Counts(3, 4, 5.0, 6.0, 7, 8)
    assert one.plus(two).minus(two) == one
    assert one.launches == 3
