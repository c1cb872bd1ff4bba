import math

import pytest
import torch

from teacher.rope import rope_angles, rotate


@pytest.mark.parametrize(("grid_hw", "head_dim", "scale"), [((2, 3), 8, 1.0), ((4, 4), 16, 1.7)])
def test_rope_angles__equal_a_loop_in_float64(
    grid_hw: tuple[int, int], head_dim: int, scale: float
) -> None:
    sine, cosine = rope_angles(grid_hw, head_dim, scale, torch.device("cpu"))
    height, width = grid_hw
    for row in range(height):
        for column in range(width):
            y, x = ((row + 0.5) / height * 2 - 1) * scale, ((column + 0.5) / width * 2 - 1) * scale
            periods = [100.0 ** (2 * i / (head_dim / 2)) for i in range(head_dim // 4)]
            angles = [2 * math.pi * c / p for c in (y, x) for p in periods] * 2
            got_sine, got_cosine = (
                sine[row * width + column].double(),
                cosine[row * width + column].double(),
            )
            torch.testing.assert_close(
                got_sine, torch.tensor([math.sin(a) for a in angles]).double(), atol=2e-6, rtol=0
            )
            torch.testing.assert_close(
                got_cosine, torch.tensor([math.cos(a) for a in angles]).double(), atol=2e-6, rtol=0
            )


def test_rotate__leaves_prefix_tokens_and_lengths_alone() -> None:
    sine, cosine = rope_angles((2, 2), 8, 1.0, torch.device("cpu"))
    heads = torch.randn(3, 2, 4 + 5, 8)
    turned = rotate(heads, sine, cosine)
    assert torch.equal(turned[:, :, :5], heads[:, :, :5])
    assert not torch.equal(turned[:, :, 5:], heads[:, :, 5:])
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1), rtol=1e-5, atol=1e-6)
