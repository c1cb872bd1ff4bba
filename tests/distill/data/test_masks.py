import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from distill.data.mask_counts import mask_counts, mean_masked
from distill.data.masks import draw_masks

WANTED = {"grid_hw": (8, 8), "probability": 0.5, "ratio": (0.1, 0.5)}


def draw(images: int, seed: int, step: int, positions: NDArray[np.int64] | None = None) -> Tensor:
    """Masks of some images of a batch, by default of all."""
    counts = mask_counts(seed=seed, step=step, images_global=images, **WANTED)
    some = np.arange(images) if positions is None else positions
    return draw_masks(seed=seed, step=step, counts=counts, positions=some, grid_hw=(8, 8))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    step=st.integers(0, 10**7),
    images=st.integers(1, 40),
    height=st.integers(1, 16),
    width=st.integers(1, 16),
)
def test_draw_masks__have_exactly_the_counts(
    seed: int, step: int, images: int, height: int, width: int
) -> None:
    wanted = {"grid_hw": (height, width), "probability": 0.5, "ratio": (0.1, 0.5)}
    counts = mask_counts(seed=seed, step=step, images_global=images, **wanted)
    everyone = np.arange(images)
    masks = draw_masks(
        seed=seed, step=step, counts=counts, positions=everyone, grid_hw=(height, width)
    )
    assert masks.shape == (images, 2, height * width)
    assert np.array_equal(masks.sum(dim=2).numpy(), counts)


def test_draw_masks__any_rank_draws_the_same() -> None:
    whole = draw(16, seed=1, step=5)
    some = np.array([3, 4, 11])
    assert torch.equal(draw(16, seed=1, step=5, positions=some), whole[some])
    assert draw(16, seed=1, step=5, positions=np.arange(0)).shape == (0, 2, 64)
    assert not torch.equal(whole, draw(16, seed=1, step=6))


def test_mask_counts__half_of_the_crops_at_evenly_spread_ratios() -> None:
    counts = np.concatenate(
        [mask_counts(seed=0, step=s, images_global=64, **WANTED).ravel() for s in range(20)]
    )
    assert (counts > 0).mean() == 0.5
    ratios = counts[counts > 0] / 64
    assert ratios.min() >= 0.09 and ratios.max() < 0.5  # counts are rounded down to whole patches
    assert ratios.mean() == pytest.approx(0.3 - 0.5 / 64, abs=0.005)


@pytest.mark.parametrize("ratio", [(0.1, 0.5), (0.3, 0.3), (0.0, 1.0)])
@pytest.mark.parametrize("grid_hw", [(8, 8), (16, 16), (6, 10)])
def test_mean_masked__is_the_mean_of_what_is_drawn(
    grid_hw: tuple[int, int], ratio: tuple[float, float]
) -> None:
    counts = mask_counts(
        seed=3, step=0, images_global=20_000, grid_hw=grid_hw, probability=0.5, ratio=ratio
    )
    expected = mean_masked(grid_hw, probability=0.5, ratio=ratio)
    assert counts.sum(axis=1).mean() == pytest.approx(expected, rel=1e-3)


def test_draw_masks__are_made_of_blocks() -> None:
    """A block-wise mask has more masked neighbours than the same number of patches scattered at random."""
    masks = draw(64, seed=0, step=0).view(-1, 8, 8).float()
    pairs = (masks[:, 1:] * masks[:, :-1]).sum() + (masks[:, :, 1:] * masks[:, :, :-1]).sum()
    ratio = masks.mean(dim=(1, 2))
    at_random = (ratio**2).sum() * 2 * 7 * 8
    assert pairs > 1.3 * at_random
