import pytest
import torch

from teacher.heads import Head, init_head_
from teacher.shapes import HeadShape


def test_head__bottleneck_has_unit_length_even_for_zero_tokens() -> None:
    head = Head(HeadShape(width=8, hidden=16, bottleneck=6, prototypes=10))
    init_head_(head, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        head(torch.randn(3, 5, 8)).norm(dim=-1), torch.ones(3, 5), rtol=1e-5, atol=0
    )
    assert head(torch.zeros(1, 8)).isfinite().all()


@pytest.mark.parametrize("bottleneck", [128, 512])
def test_init_head__prototypes_have_unit_length_for_any_width(bottleneck: int) -> None:
    head = Head(HeadShape(width=8, hidden=16, bottleneck=bottleneck, prototypes=64))
    init_head_(head, torch.Generator().manual_seed(0))
    lengths = head.prototypes.weight.detach().norm(dim=1)
    assert (
        abs(lengths.mean().item() - 1.0) < 0.02
    )  # of 64 draws; one length varies by 1 / sqrt(2 * bottleneck)


def test_parameters__are_those_of_the_head() -> None:
    shape = HeadShape(width=8, hidden=16, bottleneck=6, prototypes=10)
    assert shape.parameters == sum(p.numel() for p in Head(shape).parameters())
