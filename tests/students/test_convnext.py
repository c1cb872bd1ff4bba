from dataclasses import replace
from pathlib import Path

import pytest
import torch

from students.catalog import CATALOG
from students.convnext import ConvNeXt, ConvNeXtSpec, init_convnext_
from tests.teacher.test_vit import reference, shuffled_, sorted_by_size

SMALL = ConvNeXtSpec((1, 2, 1), (8, 16, 24))
CUT = {
    "three_stages": SMALL,
    "convnext_tiny": replace(CATALOG["convnext_tiny"], depths=(1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", CUT)
def test_parity__features_and_gradients(name: str, tmp_path: Path) -> None:
    ours = shuffled_(ConvNeXt(CUT[name]))
    theirs = reference(ours, tmp_path)
    side = CUT[name].stride
    pixels = torch.randn(2, 3, 2 * side, 3 * side)
    features = ours(pixels)
    assert features.grid_hw == (2, 3)
    got = torch.cat([features.class_token[:, None], features.patch_tokens], dim=1)
    wanted = theirs(pixels).last_hidden_state
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(wanted)
    (got * direction).sum().backward()
    (wanted * direction).sum().backward()
    our_grads = [p.grad for p in ours.parameters() if p.grad is not None]
    their_grads = [p.grad for p in theirs.parameters() if p.grad is not None]
    assert len(our_grads) == len(their_grads) == len(list(ours.parameters()))
    for mine, other in zip(sorted_by_size(our_grads), sorted_by_size(their_grads), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_convnext__refuses_masks_and_broken_sides() -> None:
    convnext = ConvNeXt(SMALL)
    with pytest.raises(ValueError, match="no mask token"):
        convnext(torch.randn(1, 3, 32, 32), torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="multiples of the stride, 16"):
        convnext(torch.randn(1, 3, 40, 32))


def test_convnext_spec__needs_one_width_per_depth() -> None:
    with pytest.raises(ValueError, match="one of each per stage"):
        ConvNeXtSpec((1, 2), (8, 16, 24))


def test_init_convnext__is_a_function_of_the_generator() -> None:
    first, second = ConvNeXt(SMALL), ConvNeXt(SMALL)
    for network in (first, second):
        init_convnext_(network, torch.Generator().manual_seed(7))
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert first.stages[0].layers[0].gamma[0].item() == pytest.approx(1e-6)
