import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.protocols.closeness import (
    RIDGE,
    closeness,
    effective_rank,
    linear_cka,
    mapped_cosine,
    mutual_knn,
)

SHAPES = st.tuples(st.integers(0, 1000), st.integers(7, 16), st.integers(1, 24), st.integers(1, 5))


def draw(seed: int, images: int, width: int) -> Tensor:
    return torch.randn(
        images, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def oracle_mutual(one: Tensor, other: Tensor, k: int) -> float:
    """The definition, one pair at a time."""
    shared = 0
    for i in range(len(one)):
        near = []
        for rows in (one.tolist(), other.tolist()):
            others = [j for j in range(len(rows)) if j != i]
            near.append(set(sorted(others, key=lambda j: -cosine(rows[i], rows[j]))[:k]))
        shared += len(near[0] & near[1])
    return shared / (k * len(one))


def oracle_cka(one: Tensor, other: Tensor) -> float:
    """By centred kernels, as the definition by HSIC has it."""
    n = len(one)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    kernels = [centring @ (rows @ rows.T) @ centring for rows in (one, other)]

    def hsic(a: Tensor, b: Tensor) -> float:
        return sum(float(a[i, j] * b[j, i]) for i in range(n) for j in range(n))

    mine, theirs = hsic(kernels[0], kernels[0]), hsic(kernels[1], kernels[1])
    return hsic(*kernels) / math.sqrt(mine * theirs)


@given(shape=SHAPES, k=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_mutual_knn__equals_the_definition(shape: tuple[int, int, int, int], k: int) -> None:
    seed, images, width, other_width = shape
    one, other = draw(seed, images, width + 1), draw(seed + 1, images, other_width + 1)
    assert mutual_knn(one, other, k) == pytest.approx(oracle_mutual(one, other, k), abs=1e-12)


@given(shape=SHAPES)
@settings(max_examples=25, deadline=None)
def test_linear_cka__equals_the_definition(shape: tuple[int, int, int, int]) -> None:
    seed, images, width, other_width = shape  # wider than images, and narrower
    one, other = draw(seed, images, width) + 3, draw(seed + 1, images, other_width)
    assert linear_cka(one, other) == pytest.approx(oracle_cka(one, other), abs=1e-9)


@pytest.mark.parametrize("width", [3, 40])
def test_mapped_cosine__equals_ridge_regression_feature_by_feature(width: int) -> None:
    features, teacher = draw(0, 20, width) + 5, draw(1, 20, 4) - 2
    known, wanted = features[::2] - features[::2].mean(0), teacher[::2] - teacher[::2].mean(0)
    ridge = RIDGE * float(sum(row @ row for row in known) / len(known))
    moments = known.T @ known + ridge * torch.eye(width, dtype=torch.float64)
    weights = torch.stack(
        [torch.linalg.solve(moments, known.T @ wanted[:, i]) for i in range(4)], dim=1
    )
    cosines = [
        cosine(
            ((row - features[::2].mean(0)) @ weights).tolist(),
            (true - teacher[::2].mean(0)).tolist(),
        )
        for row, true in zip(features[1::2], teacher[1::2], strict=True)
    ]
    expected = sum(cosines) / len(cosines)
    assert mapped_cosine(features, teacher) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("images", [12, 60])
def test_effective_rank__equals_the_entropy_of_singular_values(images: int) -> None:
    features = draw(2, images, 20) * torch.arange(1, 21) + 7
    values = torch.linalg.svdvals(features - features.mean(0)).tolist()[: min(images - 1, 20)]
    shares = [value / sum(values) for value in values]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(features) == pytest.approx(expected, rel=1e-6)


def test_effective_rank__of_known_features() -> None:
    corners = torch.cat([torch.eye(4), -torch.eye(4)])  # four directions, all as long
    assert effective_rank(corners) == pytest.approx(4)
    assert effective_rank(torch.arange(5.0)[:, None] * torch.ones(1, 9)) == pytest.approx(1)


def test_closeness__a_rotation_of_the_teacher_is_the_teacher() -> None:
    teacher = draw(3, 80, 6)
    rotation = torch.linalg.qr(draw(4, 6, 6)).Q
    near = closeness(3 * teacher @ rotation, teacher)
    assert near.mutual_knn == 1.0 and near.cka == pytest.approx(1) and near.cosine > 0.999


def test_closeness__noise_is_as_near_as_chance() -> None:
    near = closeness(draw(5, 400, 8), draw(6, 400, 8))
    assert near.mutual_knn == pytest.approx(10 / 399, abs=0.01)
    assert near.cka < 0.1 and abs(near.cosine) < 0.1


def test_closeness__features_that_are_all_the_same() -> None:
    near = closeness(torch.ones(40, 3), draw(7, 40, 3))
    assert (near.cka, near.cosine, near.effective_rank) == (0.0, 0.0, 0.0)


def test_closeness__what_fp32_loses_is_there() -> None:
    """Class tokens of an untrained ViT differ in the fourth digit."""
    teacher = draw(8, 60, 4).float()
    near = closeness(1 + 1e-5 * teacher.double(), teacher)
    assert near.cka == pytest.approx(1, abs=1e-6) and near.cosine > 0.99


def test_mutual_knn__too_few_images() -> None:
    with pytest.raises(ValueError, match="k = 10: must be below the number of images, 10"):
        mutual_knn(torch.ones(10, 2), torch.ones(10, 2))
