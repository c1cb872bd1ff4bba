import pytest
import torch
from torch import Tensor

from teacher.batch import resize_grid
from teacher.gram import gram_sum


def oracle(student: Tensor, anchor: Tensor) -> Tensor:
    """Loops over crops and pairs of patches."""
    total = torch.zeros((), dtype=torch.float64)
    for s, a in zip(student, anchor, strict=True):
        count = s.shape[0]
        for i in range(count):
            for j in range(count):
                cos_s = s[i] @ s[j] / (s[i].norm() * s[j].norm())
                cos_a = a[i] @ a[j] / (a[i].norm() * a[j].norm())
                total = total + (cos_s - cos_a) ** 2 / count**2
    return total


def test_gram_sum__equals_nested_loop_for_different_widths() -> None:
    torch.manual_seed(0)
    student = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    anchor = torch.randn(2, 6, 7, dtype=torch.float64)
    expected = oracle(student, anchor)
    loss = gram_sum(student, anchor)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (grad,), (wanted,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-14)


def test_gram_sum__refuses_other_patch_counts() -> None:
    with pytest.raises(ValueError, match="6 student patches against 4 anchor patches"):
        gram_sum(torch.randn(1, 6, 4), torch.randn(1, 4, 4))


def test_resize_grid__keeps_order_and_constant_maps() -> None:
    rising = torch.arange(4.0).repeat_interleave(4).view(1, 16, 1)  # rows 0..3 of a 4x4 grid
    smaller = resize_grid(rising, (4, 4), (2, 2), "bicubic")
    assert smaller[0, 0] == smaller[0, 1] < smaller[0, 2] == smaller[0, 3]
    assert torch.equal(resize_grid(rising, (4, 4), (4, 4), "bicubic"), rising)
    assert torch.allclose(
        resize_grid(torch.ones(2, 4, 3), (2, 2), (8, 8), "bilinear"), torch.ones(2, 64, 3)
    )
