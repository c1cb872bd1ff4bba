import pytest
import torch

from distill.screen.components import (
    cosine_map,
    foreground_of,
    middle_of,
    principal_components,
    rgb,
    turn_towards,
)
from tests.support.pictures import blob


def test_principal_components__are_white_and_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 9.0, 3.0, 0.1, 5.0], dtype=torch.float64)
    patches = torch.randn(12, 10, 5, generator=generator, dtype=torch.float64) * scales + 4.0
    components = principal_components(patches)
    rows = components.flatten(0, 1)
    covariance = rows.T @ rows / len(rows)
    assert torch.allclose(covariance, torch.eye(3, dtype=torch.float64), atol=1e-9)
    for index, source in enumerate((1, 4, 2)):
        correlation = torch.corrcoef(torch.stack([rows[:, index], patches[..., source].flatten()]))
        assert correlation[0, 1] > 0.9  # and the sign is that of the largest loading


def test_principal_components__flat_features_are_grey() -> None:
    components = principal_components(torch.ones(3, 3, 8, dtype=torch.float64))
    assert not components.any()
    assert (rgb(components) == 0.5).all()


def test_principal_components__of_a_part_are_white_there_and_the_rest_is_projected() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(20, 20, 5, generator=generator)
    inside = torch.zeros(20, 20, dtype=torch.bool)
    inside[4:12, 4:16] = True
    patches[~inside] += 50.0
    components = principal_components(patches, inside)
    rows = components[inside]
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(rows.T @ rows / len(rows), eye, atol=1e-6)
    assert float(components[~inside].abs().mean()) > 5.0


def test_principal_components__are_the_same_from_the_small_matrix_and_the_large() -> None:
    """More patches than channels take another way than fewer."""
    patches = torch.randn(4, 4, 15, generator=torch.Generator().manual_seed(0)).double()
    wide = torch.cat([patches, torch.zeros(4, 4, 9, dtype=torch.float64)], dim=-1)
    found, expected = principal_components(patches), principal_components(wide)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_principal_components__of_two_channels_leave_the_third_grey() -> None:
    components = principal_components(torch.randn(5, 5, 2))
    assert components.shape == (5, 5, 3) and not components[..., 2].any()


def test_foreground_of__is_the_disc_whatever_its_sign() -> None:
    patches = blob()
    for sign in (1.0, -1.0):
        mask = foreground_of(sign * patches)
        assert mask is not None
        assert mask[10, 18] and not mask[0, 0]
        assert 120 < int(mask.sum()) < 170
    row, column = middle_of(mask)
    assert (row, column) == pytest.approx((10.5 / 24, 18.5 / 32), abs=0.04)


def test_foreground_of__a_picture_without_one_has_none() -> None:
    """Left and right differ, so neither is rarer along the border; and where nothing differs there is nothing."""
    halves = torch.zeros(16, 16, 4)
    halves[:, 8:] = 1.0
    assert foreground_of(halves) is None
    assert foreground_of(torch.ones(16, 16, 4)) is None
    assert foreground_of(torch.randn(1, 3, 4)) is None


def test_turn_towards__undoes_a_turn() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = principal_components(torch.randn(6, 7, 4, generator=generator, dtype=torch.float64))
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    turned = turn_towards(reference @ turn, reference)
    assert torch.allclose(turned, reference, atol=1e-9)


def test_cosine_map__is_one_at_the_point() -> None:
    patches = torch.randn(4, 6, 8, dtype=torch.float64)
    similarity = cosine_map(patches, (0.99, 0.0))
    assert similarity.shape == (4, 6)
    assert similarity[3, 0] == pytest.approx(1.0)
    expected = torch.cosine_similarity(patches[3, 0], patches[1, 2], dim=0)
    assert similarity[1, 2] == pytest.approx(float(expected))
