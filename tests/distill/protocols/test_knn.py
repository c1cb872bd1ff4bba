import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.data.index import ImageIndex
from distill.protocols.images import (
    read_split,
)
from distill.protocols.knn import (
    balanced_accuracy,
    colour_rows,
    knn,
    pixel_rows,
    rgb_stats,
)
from tests.support.scored_run import scored


def oracle_knn(train: Tensor, train_y: Tensor, test: Tensor, test_y: Tensor, k: int) -> float:
    """The definition, one pair at a time."""
    right: Counter[int] = Counter()
    total: Counter[int] = Counter()
    for asked, label in zip(test.tolist(), test_y.tolist(), strict=True):
        similarity = []
        for known, known_label in zip(train.tolist(), train_y.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(asked, known, strict=True))
            norms = math.hypot(*asked) * math.hypot(*known)
            similarity.append((dot / norms, known_label))
        nearest = sorted(similarity, key=lambda pair: -pair[0])[:k]
        votes = Counter(known_label for _, known_label in nearest)
        winner = max(
            votes,
            key=lambda candidate: (
                votes[candidate],
                sum(value for value, voter in nearest if voter == candidate),
            ),
        )
        total[label] += 1
        right[label] += winner == label
    return sum(right[label] / total[label] for label in total) / len(total)


@given(
    seed=st.integers(0, 10_000),
    k=st.integers(1, 6),
    num_classes=st.integers(1, 4),
    num_train=st.integers(6, 20),
    num_test=st.integers(1, 12),
)
@settings(max_examples=40, deadline=None)
def test_knn__equals_the_definition(
    seed: int, k: int, num_classes: int, num_train: int, num_test: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    train = torch.randn(num_train, 3, generator=generator, dtype=torch.float64)
    test = torch.randn(num_test, 3, generator=generator, dtype=torch.float64)
    train_y = torch.randint(num_classes, (num_train,), generator=generator)
    test_y = torch.randint(num_classes, (num_test,), generator=generator)
    expected = oracle_knn(train, train_y, test, test_y, k)
    assert knn(train, train_y, test, test_y, k) == pytest.approx(expected, abs=1e-12)


def test_knn__a_tie_goes_to_the_more_similar_class() -> None:
    train = torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [1.0, 0.4]])
    labels = torch.tensor([0, 0, 1, 1])
    assert knn(train, labels, torch.tensor([[1.0, 1.0]]), torch.tensor([1]), 4) == 1.0
    assert knn(train, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([0]), 4) == 1.0


def test_knn__sees_differences_that_fp32_cosines_lose() -> None:
    offsets = torch.tensor([[1e-5, 0.0], [0.0, 1e-5], [1.1e-5, 0.0], [0.0, 1.1e-5]])
    features = torch.cat([torch.ones(4, 1), offsets], dim=1)
    labels = torch.tensor([0, 1, 0, 1])
    assert knn(features[:2], labels[:2], features[2:], labels[2:], 1) == 1.0


def test_knn__euclidean_differs_from_cosine() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
    test, labels = torch.tensor([[0.0, 1.0]]), torch.tensor([0, 1])
    assert knn(train, labels, test, labels[1:], 1) == 1.0
    assert knn(train, labels, test, labels[:1], 1, measure="euclidean") == 1.0


def test_knn__too_few_images() -> None:
    features, labels = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="k = 5: must be at most the number of training images, 3"):
        knn(features, labels, features, labels)
    with pytest.raises(ValueError, match="no held-out image"):
        knn(features, labels, features[:0], labels[:0], 1)


def test_balanced_accuracy__classes_count_the_same() -> None:
    labels = torch.tensor([0] * 98 + [1] * 2)
    assert balanced_accuracy(torch.zeros_like(labels), labels) == 0.5
    assert balanced_accuracy(labels + 3, labels) == 0.0


def test_colour_statistics__mean_and_spread() -> None:
    images = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    statistics = rgb_stats(images)
    expected = np.concatenate(
        [images.numpy().mean((2, 3)), images.numpy().reshape(2, 3, -1).std(2)], axis=1
    )
    # fp32 means of 35 values up to 255
    np.testing.assert_allclose(statistics.numpy(), expected, rtol=1e-5)


def test_colour_rows__sees_colour(splits: tuple[ImageIndex, ImageIndex]) -> None:
    read = [read_split(scored(split), 16, None) for split in splits]
    labels, query = (each.split.labels for each in read)
    known, wanted = colour_rows(*read)
    assert knn(known, labels, wanted, query, measure="euclidean") == 1.0


def test_pixel_rows__is_a_fraction(splits: tuple[ImageIndex, ImageIndex]) -> None:
    read = [read_split(scored(split), 16, None) for split in splits]
    labels, query = (each.split.labels for each in read)
    known, wanted = pixel_rows(*read)
    assert 0.0 <= knn(known, labels, wanted, query, measure="euclidean") <= 1.0
