import math

import pytest
import torch
from torch import Tensor

from teacher import chunks
from teacher.chunks import sinkhorn
from teacher.heads import cross_entropy
from teacher.losses import koleo_sum


def cross_entropy_oracle(
    student: Tensor, prototypes: Tensor, targets: Tensor, mixture: Tensor, weights: Tensor
) -> Tensor:
    """Nested loops over student crops, target crops, rows and prototypes."""
    loss = torch.zeros((), dtype=torch.float64)
    for c in range(student.shape[0]):
        for t in range(mixture.shape[1]):
            for n in range(student.shape[1]):
                logits = prototypes @ student[c, n] / 0.1
                log_total = torch.logsumexp(logits, 0)
                for k in range(prototypes.shape[0]):
                    loss = loss - mixture[c, t] * weights[n] * targets[t, n, k] * (
                        logits[k] - log_total
                    )
    return loss


def make(rows: int = 3, crops: int = 4, num_prototypes: int = 11) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    f64 = torch.float64
    student = torch.randn(crops, rows, 5, dtype=f64, requires_grad=True)
    prototypes = torch.randn(num_prototypes, 5, dtype=f64, requires_grad=True)
    bottleneck = torch.randn(2 * rows, 5, dtype=f64)
    teacher_prototypes = torch.randn(num_prototypes, 5, dtype=f64)
    mixture = torch.tensor([[0, 1], [1, 0], [0.5, 0.5], [1, 1]], dtype=f64)[:crops]
    weights = torch.rand(rows, dtype=f64)
    return student, prototypes, bottleneck, teacher_prototypes, mixture, weights


@pytest.mark.parametrize("chunk", [3, 4096])
def test_cross_entropy__value_and_gradients_equal_nested_loop(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "PROTOTYPES_AT_ONCE", chunk)
    student, prototypes, bottleneck, teacher_prototypes, mixture, weights = make()
    assignment = sinkhorn(bottleneck, teacher_prototypes, 0.07)
    targets = assignment.columns(0, 11).view(2, 3, 11)
    expected = cross_entropy_oracle(student, prototypes, targets, mixture, weights)
    expected_grads = torch.autograd.grad(expected, (student, prototypes))
    loss = cross_entropy(student, prototypes, assignment, mixture, weights)
    grads = torch.autograd.grad(loss, (student, prototypes))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-10, atol=1e-13)


def test_cross_entropy__no_rows_is_zero_with_zero_gradients() -> None:
    student = torch.zeros(1, 0, 5, requires_grad=True)
    prototypes = torch.randn(7, 5, requires_grad=True)
    assignment = sinkhorn(torch.zeros(0, 5), torch.randn(7, 5), 0.07)
    loss = cross_entropy(student, prototypes, assignment, torch.ones(1, 1), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
    assert prototypes.grad is not None and not prototypes.grad.any()


def koleo_oracle(tokens: Tensor, group_size: int) -> Tensor:
    """For each image the nearest other image of its group, by a loop."""
    rows = [row / row.norm() for row in tokens]
    loss = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(rows):
        first = i // group_size * group_size
        others = [j for j in range(first, min(first + group_size, len(rows))) if j != i]
        if others:
            nearest = max(others, key=lambda j: float((row @ rows[j]).detach()))
            loss = loss - ((row - rows[nearest] + 1e-8).norm() + 1e-8).log()
    return loss


@pytest.mark.parametrize(("images", "group_size"), [(8, 4), (9, 4), (2, 16), (1, 16)])
def test_koleo_sum__equals_nested_loop(images: int, group_size: int) -> None:
    torch.manual_seed(2)
    tokens = torch.randn(images, 6, dtype=torch.float64, requires_grad=True)
    expected = koleo_oracle(tokens, group_size)
    loss = koleo_sum(tokens, group_size, 0, images)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    if images > 1:
        (grad,) = torch.autograd.grad(loss, tokens)
        (wanted,) = torch.autograd.grad(expected, tokens)
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)


def test_koleo_sum__duplicates_and_one_image_stay_finite() -> None:
    tokens = torch.ones(4, 6, requires_grad=True)
    loss = koleo_sum(tokens, 16, 0, 4)
    loss.backward()
    assert math.isfinite(loss.item()) and tokens.grad is not None and tokens.grad.isfinite().all()
    lone = torch.ones(1, 6, requires_grad=True)
    koleo_sum(lone, 16, 0, 1).backward()
    assert lone.grad is not None and not lone.grad.any()
