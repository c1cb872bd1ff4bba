"""Hierarchies: the draw is more even than chance and loses no classes, goes on after a kill, and refuses what cannot be."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.curation import hierarchy
from distill.curation.balance import evenness, sample_balanced
from distill.curation.hierarchy import Level, Settings, build, default_levels, default_rounds
from distill.curation.rows import VectorsInMemory
from distill.errors import DataError
from tests.support.spawn import on_ranks

NUM_CLASSES, TARGET = 200, 500


def long_tail(noise: float, seed: int, num_images: int) -> tuple[VectorsInMemory, np.ndarray]:
    """Points of 200 classes by a Zipf law (1.3): unit class means and Gaussian noise of norm ``noise``, normalised."""
    random = np.random.default_rng(seed)
    means = random.standard_normal((NUM_CLASSES, 384))
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    shares = 1 / np.arange(1, NUM_CLASSES + 1) ** 1.3
    labels = random.choice(NUM_CLASSES, num_images, p=shares / shares.sum())
    points = means[labels] + random.standard_normal((num_images, 384)) * noise / 384**0.5
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return VectorsInMemory(torch.from_numpy(points).float()), labels


def compare(noise: float, seed: int, folder: Path, *, rounds: int) -> None:
    """The draw against 20 random ones: evenness at least 0.05 above their mean, and as many classes as the best of them."""
    rows, labels = long_tail(noise, seed, 5_000)
    settings = Settings(default_levels(5_000, TARGET), seed, rounds=rounds)
    taken = sample_balanced(
        [each.parents for each in build(rows, settings, folder)], TARGET, seed=seed
    )
    random = np.random.default_rng(seed)
    by_chance = [labels[random.choice(5_000, TARGET, replace=False)] for _ in range(20)]
    drawn = labels[taken > 0]
    assert len(drawn) == TARGET
    mean = np.mean([evenness(each, NUM_CLASSES) for each in by_chance])
    assert evenness(drawn, NUM_CLASSES) >= mean + 0.05
    assert len(np.unique(drawn)) >= max(len(np.unique(each)) for each in by_chance)


def test_balanced_draw__is_more_even_than_chance_and_keeps_as_many_classes(tmp_path: Path) -> None:
    compare(3.0, 0, tmp_path / "h", rounds=1)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [1.0, 2.0, 3.0])
def test_balanced_draw__holds_for_every_seed(noise: float, tmp_path: Path) -> None:
    for seed in range(5):
        compare(noise, seed, tmp_path / str(seed), rounds=default_rounds(5_000))


def on_each_rank(folder: Path) -> list[np.ndarray]:
    levels = build(long_tail(1.0, 0, 2_500)[0], Settings((60, 10), rounds=1), folder)
    return [array for each in levels for array in (each.parents, each.centroids.numpy())]


@pytest.mark.slow
def test_hierarchy__is_the_same_on_one_rank_and_two(tmp_path: Path) -> None:
    (alone,) = on_ranks(1, on_each_rank, tmp_path / "one")
    for found in on_ranks(2, on_each_rank, tmp_path / "two"):
        assert all(np.array_equal(a, b) for a, b in zip(alone, found, strict=True))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert not [name for name in names if "fit" in name or "part" in name]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 4, 7])
def test_hierarchy__goes_on_after_a_kill(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, settings = long_tail(1.0, 0, 1_000)[0], Settings((50, 12, 3), rounds=2)
    whole = build(rows, settings, tmp_path / "whole")
    fits: list[int] = []
    fit = hierarchy.fit

    def counted(*args: object, **keys: object) -> torch.Tensor:
        fits.append(1)
        if len(fits) > after and len(fits) < 100:
            raise Killed
        return fit(*args, **keys)  # type: ignore[arg-type]

    monkeypatch.setattr(hierarchy, "fit", counted)
    with pytest.raises(Killed):
        build(rows, settings, tmp_path / "cut")
    fits[:] = [1] * 100
    resumed = build(rows, settings, tmp_path / "cut")
    assert len(fits) - 100 == num_fits(whole) - after
    for one, other in zip(whole, resumed, strict=True):
        assert np.array_equal(one.parents, other.parents)
        assert torch.equal(one.centroids, other.centroids)


def num_fits(levels: list[Level]) -> int:
    """Each level once and two rounds: its clusters have four inputs or more on average."""
    assert all(len(each.parents) >= 4 * len(each.centroids) for each in levels)
    return 3 * len(levels)


def test_another_seed_in_the_same_folder__is_refused(tmp_path: Path) -> None:
    rows = long_tail(1.0, 0, 100)[0]
    build(rows, Settings((10,)), tmp_path / "h")
    with pytest.raises(DataError, match="other embeddings, levels or seed"):
        build(rows, Settings((10,), seed=1), tmp_path / "h")


@pytest.mark.parametrize("levels", [(10, 10), (5, 20), (101,), (10, 0)])
def test_levels_that_cannot_be__are_refused_before_anything_is_written(
    levels: tuple[int, ...], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"levels .*: \d+ clusters, where 1 or more"):
        build(long_tail(1.0, 0, 100)[0], Settings(levels), tmp_path / "h")
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize("num_images", [1, 2, 7, 40])
def test_small_and_identical_pools__are_clustered(num_images: int, tmp_path: Path) -> None:
    same = VectorsInMemory(torch.ones(num_images, 4) / 2)
    levels = build(same, Settings(default_levels(num_images, num_images)), tmp_path / "h")
    assert [len(each.centroids) for each in levels] == [1] * len(levels)
    assert (
        sample_balanced([each.parents for each in levels], num_images, seed=0).tolist()
        == [1] * num_images
    )


@pytest.mark.parametrize(
    ("num_images", "target", "levels"),
    [
        (5_000, 500, (1_000, 500, 250)),
        (1_000_000, 100_000, (16_000, 8_000, 4_000)),
        (1, 1, (1,)),
        (40, 10, (8, 4, 2)),
    ],
)
def test_default_levels__follow_pool_and_target(
    num_images: int, target: int, levels: tuple[int, ...]
) -> None:
    assert default_levels(num_images, target) == levels
