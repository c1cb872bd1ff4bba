import math

import numpy as np
import pytest
import torch

from distill.protocols.knn import balanced_accuracy
from distill.protocols.score import Score, bootstrap, bootstrap_sums, interval_of, mean_interval


def test_bootstrap__spreads_as_the_binomial_does() -> None:
    right = torch.arange(400) % 4 > 0
    scores = bootstrap(right, torch.zeros(400, dtype=torch.int64), "images")
    assert float(scores.mean()) == pytest.approx(0.75, abs=0.005)
    expected = math.sqrt(0.75 * 0.25 / 400)
    assert float(scores.std()) == pytest.approx(expected, rel=0.1)
    low, high = interval_of(scores)
    assert (high - low) / 2 == pytest.approx(1.96 * expected, rel=0.1)


def test_bootstrap_sums__of_a_share_spreads_as_bootstrap_does() -> None:
    right = torch.arange(400) % 4 > 0
    rows = torch.stack([right.double(), torch.ones(400, dtype=torch.float64)], dim=1)
    scores = bootstrap_sums(rows, lambda sums: sums[:, 0] / sums[:, 1])
    of_images = bootstrap(right, torch.zeros(400, dtype=torch.int64), "images")
    assert float(scores.mean()) == pytest.approx(float(of_images.mean()), abs=0.005)
    assert float(scores.std()) == pytest.approx(float(of_images.std()), rel=0.1)


def test_bootstrap__over_classes_is_the_score_that_is_reported() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    right = torch.cat([torch.ones(90), torch.zeros(10)]).bool()
    scores = bootstrap(right, labels)
    votes = torch.zeros(100, dtype=torch.int64)
    assert float(scores.mean()) == pytest.approx(balanced_accuracy(votes, labels), abs=1e-3)


def test_bootstrap__is_the_same_for_two_networks() -> None:
    """Then the difference of a network and itself is 0 in every resample."""
    labels = torch.arange(50) % 5
    right = labels > 1
    assert torch.equal(bootstrap(right, labels), bootstrap(right.clone(), labels))
    wrong_once = right.clone()
    wrong_once[labels.tolist().index(2)] = False
    assert bool((bootstrap(wrong_once, labels) <= bootstrap(right, labels)).all())


def test_mean_interval__is_of_students_t() -> None:
    from scipy.stats import t

    draws = torch.tensor([0.5, 0.6, 0.7, 0.4], dtype=torch.float64)
    values = draws.numpy()
    expected = t.interval(0.95, 3, values.mean(), values.std(ddof=1) / 2)
    np.testing.assert_allclose(mean_interval(draws), expected, rtol=1e-12)
    assert mean_interval(draws[:1]) == (0.5, 0.5)


def test_score__is_json() -> None:
    found = Score("knn", "quick", 0.5, (0.4, 0.6), {"k": 5}).to_json()
    assert found == {
        "protocol": "quick",
        "value": 0.5,
        "interval": [0.4, 0.6],
        "settings": {"k": 5},
    }
