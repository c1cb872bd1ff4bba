"""k-means: a good start, exact sums, the same clusters on any number of ranks, degenerate pools."""

import numpy as np
import pytest
import torch

from distill.curation import kmeans
from distill.curation.kmeans import assign, fit, inertia, start
from distill.curation.rows import VectorsInMemory, to_fixed
from tests.support.spawn import on_ranks


def clouds(num_rows: int, *, num_clouds: int = 40, width: int = 16) -> VectorsInMemory:
    random = torch.Generator().manual_seed(5)
    means = torch.randn(num_clouds, width, generator=random)
    which = torch.randint(num_clouds, (num_rows,), generator=random)
    values = means[which] + 0.1 * torch.randn(num_rows, width, generator=random)
    return VectorsInMemory(values / values.norm(dim=1, keepdim=True))


def fitted(k: int) -> tuple[np.ndarray, np.ndarray]:
    """Run on every rank of a world: three blocks and a part of one."""
    rows = clouds(3_500)
    centroids = fit(rows, k, seed=(0,), iterations=8, spherical=True)
    return centroids.numpy(), assign(rows, centroids).labels


def test_clusters__are_the_same_bits_on_any_number_of_ranks() -> None:
    (alone,) = on_ranks(1, fitted, 60)
    for centroids, labels in [*on_ranks(2, fitted, 60), *on_ranks(3, fitted, 60)]:
        assert np.array_equal(centroids, alone[0])
        assert np.array_equal(labels, alone[1])


@pytest.mark.parametrize("greedy_up_to", [2_048, 0])
def test_start__has_a_row_of_every_cloud_where_a_random_one_has_not(
    monkeypatch: pytest.MonkeyPatch, greedy_up_to: int
) -> None:
    monkeypatch.setattr(kmeans, "GREEDY_UP_TO", greedy_up_to)
    rows = clouds(2_000)
    chosen = start(rows, 80, (0,))
    by_chance = rows.values[torch.randperm(2_000, generator=torch.Generator().manual_seed(0))[:80]]
    assert len(chosen) == 80
    assert inertia(rows, chosen) < 0.5 * inertia(rows, by_chance)


def test_fit__brings_down_the_inertia_and_means_are_means() -> None:
    rows = clouds(2_000)
    centroids = fit(rows, 40, seed=(0,), iterations=30, spherical=False)
    assert inertia(rows, centroids) < inertia(rows, start(rows, 40, (0,)))
    labels = assign(rows, centroids).labels
    for cluster in (0, len(centroids) - 1):
        mean = rows.values[torch.from_numpy(labels == cluster)].mean(dim=0)
        torch.testing.assert_close(centroids[cluster], mean)


def test_spherical_centroids__are_of_length_one() -> None:
    lengths = fit(clouds(1_000), 30, seed=(0,), iterations=5, spherical=True).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_rows_that_are_all_the_same__are_one_cluster() -> None:
    rows = VectorsInMemory(torch.ones(500, 8) / 8**0.5)
    centroids = fit(rows, 20, seed=(0,), iterations=5, spherical=True)
    torch.testing.assert_close(centroids, rows.values[:1])


def test_an_empty_cluster__takes_the_farthest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.zeros(100, 2)
    values[:50, 0], values[50:, 0] = 1.0, -1.0
    values[7] = torch.tensor([0.0, 5.0])
    # the third start is nobody's nearest
    starts = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -90.0]])
    monkeypatch.setattr(kmeans, "start", lambda *_: starts)
    centroids = fit(VectorsInMemory(values), 3, seed=(0,), iterations=5, spherical=False)
    assert sorted(centroids.tolist()) == [[-1.0, 0.0], [0.0, 5.0], [1.0, 0.0]]


def test_sums_in_fixed_point__do_not_depend_on_the_order() -> None:
    values = torch.randn(10_000, 3, generator=torch.Generator().manual_seed(0))
    fixed = to_fixed(values, 40)
    assert torch.equal(fixed.sum(dim=0), fixed.flip(0).sum(dim=0))
    torch.testing.assert_close(fixed.sum(dim=0).double() / 2.0**40, values.double().sum(dim=0))
