"""Choosing images by their embeddings: the pool, the seed, bad embeddings and targets."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.curation.curate import Curated, CurationTarget, UnitVectors, curate
from distill.curation.rows import VectorsInMemory
from distill.errors import DataError


def embeddings(num_images: int = 300) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return 3 * torch.randn(num_images, 8, generator=random)


def chosen_from(values: torch.Tensor, choice: CurationTarget, folder: Path) -> Curated:
    return curate(VectorsInMemory(values), choice, folder)


def test_choice__is_the_same_for_a_seed_and_another_for_another(tmp_path: Path) -> None:
    first, again, other = (
        chosen_from(embeddings(), CurationTarget(40, seed=seed), tmp_path / str(folder))
        for folder, seed in enumerate((0, 0, 1))
    )
    assert first.times.sum() == 40
    assert np.array_equal(first.times, again.times)
    assert np.array_equal(first.paths, again.paths)
    assert (first.times != other.times).any()


def test_pool__is_all_that_is_chosen_from(tmp_path: Path) -> None:
    pool = np.arange(300) % 3 > 0
    values = embeddings()
    values[~torch.from_numpy(pool)] = torch.nan  # broken pictures have no embedding
    found = curate(VectorsInMemory(values), CurationTarget(50), tmp_path / "c", pool=pool)
    assert found.times.sum() == 50
    assert not found.times[~pool].any()
    assert (found.paths[:, ~pool] == -1).all()
    assert (found.paths[:, pool] >= 0).all()


def test_similarity__is_the_cosine_to_the_centroid(tmp_path: Path) -> None:
    values = embeddings()
    found = chosen_from(values, CurationTarget(40, levels=(20, 5)), tmp_path / "c")
    centroids = torch.from_numpy(np.load(tmp_path / "c" / "level-1-centroids.npy"))
    of_each = centroids[torch.from_numpy(found.paths[0]).long()]
    expected = torch.nn.functional.cosine_similarity(values, of_each)
    np.testing.assert_allclose(found.similarity, expected.numpy(), atol=1e-5)


def test_unit_vectors__read_chosen_rows() -> None:
    chosen = np.array([3, 10, 11, 250])
    vectors = UnitVectors(VectorsInMemory(embeddings()), chosen)
    expected = torch.nn.functional.normalize(embeddings()[[10, 11]], dim=1)
    torch.testing.assert_close(vectors.block(1, 3), expected)


@pytest.mark.parametrize("target", [0, 301])
def test_a_target_beyond_the_pool__is_refused(target: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"a target of {target} of 300 images") as raised:
        chosen_from(embeddings(), CurationTarget(target), tmp_path / "c")
    assert raised.value.fix == "Give a target from 1 to 300."


def test_repeats__allow_a_larger_target(tmp_path: Path) -> None:
    found = chosen_from(embeddings(), CurationTarget(450, repeats=2), tmp_path / "c")
    assert found.times.sum() == 450
    assert found.times.max() == 2


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_embeddings_that_are_zero_or_not_finite__are_named(value: float, tmp_path: Path) -> None:
    values = embeddings()
    values[[7, 9]] = value
    with pytest.raises(
        DataError, match="2 of 300 embeddings are zero or not finite, the first in row 7"
    ):
        chosen_from(values, CurationTarget(10), tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("num_images", [1, 30])
def test_pictures_that_are_all_the_same__are_chosen_from(num_images: int, tmp_path: Path) -> None:
    found = chosen_from(torch.ones(num_images, 8), CurationTarget(1), tmp_path / "c")
    assert found.times.sum() == 1
