import math

import pytest
import torch
from torch import Tensor

from teacher.vit import Tile, rope_angles, rotate

CPU = torch.device("cpu")
CASES = [((2, 3), 8, 1.0), ((4, 4), 16, 1.7), ((1, 5), 64, 0.5), ((7, 2), 128, 1.0)]


def angle_of_each_channel(row: float, column: float, head_dim: int) -> list[float]:
    """Angles of one patch by a plain loop: row then column, each over the periods, all twice."""
    angles = []
    for coordinate in (row, column):
        for i in range(head_dim // 4):
            angles.append(2.0 * math.pi * coordinate / 100.0 ** (2.0 * i / (head_dim / 2)))
    return angles + angles


def rotated_by_loop(
    heads: Tensor, grid_hw: tuple[int, int], head_dim: int, scale: float, num_prefix: int
) -> Tensor:
    """Each pair (channel j, channel j + D/2) of each patch turned by its angle, in float64."""
    result = heads.double().clone()
    half = head_dim // 2
    for row in range(grid_hw[0]):
        for column in range(grid_hw[1]):
            y = scale * ((row + 0.5) / grid_hw[0] * 2.0 - 1.0)
            x = scale * ((column + 0.5) / grid_hw[1] * 2.0 - 1.0)
            angles = angle_of_each_channel(y, x, head_dim)
            token = num_prefix + row * grid_hw[1] + column
            for j in range(half):
                a, b = heads[:, :, token, j].double(), heads[:, :, token, j + half].double()
                result[:, :, token, j] = a * math.cos(angles[j]) - b * math.sin(angles[j])
                result[:, :, token, j + half] = b * math.cos(angles[j]) + a * math.sin(angles[j])
    return result


@pytest.mark.parametrize(("grid_hw", "head_dim", "scale"), CASES)
def test_rope_angles__equal_a_loop_in_float64(
    grid_hw: tuple[int, int], head_dim: int, scale: float
) -> None:
    sine, cosine = rope_angles(grid_hw, head_dim, scale, CPU)
    assert sine.dtype == cosine.dtype == torch.float32
    wanted = torch.tensor(
        [
            angle_of_each_channel(
                scale * ((row + 0.5) / grid_hw[0] * 2.0 - 1.0),
                scale * ((column + 0.5) / grid_hw[1] * 2.0 - 1.0),
                head_dim,
            )
            for row in range(grid_hw[0])
            for column in range(grid_hw[1])
        ],
        dtype=torch.float64,
    )
    # angles up to 2 pi 1.7 = 10.7, a few fp32 roundings of them: 4 * 10.7 * 6e-8
    torch.testing.assert_close(sine.double(), wanted.sin(), atol=2.5e-6, rtol=0)
    torch.testing.assert_close(cosine.double(), wanted.cos(), atol=2.5e-6, rtol=0)


@pytest.mark.parametrize(("grid_hw", "head_dim", "scale"), CASES)
def test_rotate__equals_a_loop_in_float64(
    grid_hw: tuple[int, int], head_dim: int, scale: float
) -> None:
    heads = torch.randn(2, 2, 3 + grid_hw[0] * grid_hw[1], head_dim)
    turned = rotate(heads, *rope_angles(grid_hw, head_dim, scale, CPU))
    wanted = rotated_by_loop(heads, grid_hw, head_dim, scale, num_prefix=3)
    # the error of the angles times values up to 5, twice
    torch.testing.assert_close(turned.double(), wanted, atol=2e-5, rtol=0)


def test_rotate__leaves_prefix_tokens_and_lengths_alone() -> None:
    sine, cosine = rope_angles((2, 2), 8, 1.0, CPU)
    heads = torch.randn(3, 2, 4 + 5, 8)
    turned = rotate(heads, sine, cosine)
    assert torch.equal(turned[:, :, :5], heads[:, :, :5])
    assert not torch.equal(turned[:, :, 5:], heads[:, :, 5:])
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1), rtol=1e-5, atol=1e-6)


def test_rotate__makes_products_depend_on_the_offset_only() -> None:
    sine, cosine = rope_angles((4, 4), 16, 1.0, CPU)
    query, key = torch.randn(16), torch.randn(16)
    everywhere = torch.ones(1, 1, 16, 1)
    queries, keys = (rotate(everywhere * v, sine, cosine)[0, 0] for v in (query, key))
    products = (queries @ keys.T).reshape(4, 4, 4, 4)  # [row, column, row, column]
    torch.testing.assert_close(products[1:, 1:, 1:, 1:], products[:3, :3, :3, :3])


def test_rotate__computes_bf16_in_fp32() -> None:
    sine, cosine = rope_angles((3, 3), 16, 1.0, CPU)
    heads = torch.randn(2, 2, 10, 16).bfloat16()
    turned = rotate(heads, sine, cosine)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(heads.float(), sine, cosine).bfloat16())


@pytest.mark.parametrize(("grid_hw", "head_dim", "scale"), CASES)
def test_rope_angles__of_a_tile_are_those_of_its_patches_in_the_image(
    grid_hw: tuple[int, int], head_dim: int, scale: float
) -> None:
    height, width = grid_hw
    first = (height // 2, width // 2)
    part = (height - first[0], width - first[1])
    image = rope_angles(grid_hw, head_dim, scale, CPU)
    tile = rope_angles(part, head_dim, scale, CPU, tile=Tile(grid_hw, first))
    for of_image, of_tile in zip(image, tile, strict=True):
        cut = of_image.unflatten(0, grid_hw)[first[0] :, first[1] :]
        assert torch.equal(of_tile, cut.flatten(0, 1))
