"""The relational loss against nested loops in float64, and that slices add up to the batch."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from students.relational import Form, relational_sum, relational_term
from teacher.batch import PatchMasks, StudentBatch
from tests.support.tiny import SPEC, network, student_batch, teacher

FORMS: tuple[Form, ...] = ("softmax", "gram")


def oracle(
    student: Tensor, teacher: Tensor, masks: Tensor, form: Form, temperature: float
) -> Tensor:
    """Loops over crops and pairs of masked patches."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t, mask in zip(student, teacher, masks, strict=True):
        places = mask.nonzero().flatten().tolist()
        for i in places:
            others = [j for j in places if j != i]
            ours, theirs = (
                {j: x[i] @ x[j] / (x[i].norm() * x[j].norm()) for j in others} for x in (s, t)
            )
            if form == "gram":
                total = total + sum((ours[j] - theirs[j]) ** 2 for j in others) / len(places) ** 2
                continue
            sums = [sum(torch.exp(x[j] / temperature) for j in others) for x in (ours, theirs)]
            for j in others:
                q, p = (
                    torch.exp(x[j] / temperature) / z
                    for x, z in zip((ours, theirs), sums, strict=True)
                )
                total = total + p * torch.log(p / q) / len(places)
    return total


@pytest.mark.parametrize("form", FORMS)
def test_relational_sum__equals_nested_loops_for_different_widths(form: Form) -> None:
    torch.manual_seed(0)
    student = torch.randn(4, 7, 5, dtype=torch.float64, requires_grad=True)
    teacher_patches = torch.randn(4, 7, 3, dtype=torch.float64)
    masks = torch.rand(4, 7) < 0.6
    masks[0], masks[1] = False, False
    masks[1, 2] = True  # a crop without a masked patch, and one with a single one
    expected = oracle(student, teacher_patches, masks, form, 0.3)
    loss = relational_sum(student, teacher_patches, masks, form, 0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (grad,), (wanted,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-14)
    assert not grad[:2].any()


@pytest.mark.parametrize("form", FORMS)
def test_relational_sum__is_zero_where_similarities_agree(form: Form) -> None:
    teacher_patches = torch.randn(2, 6, 4, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    masks = torch.ones(2, 6, dtype=torch.bool)
    turned = 3.0 * teacher_patches @ turn
    assert relational_sum(turned, teacher_patches, masks, form, 0.07).item() == pytest.approx(
        0, abs=1e-12
    )
    other = torch.randn(2, 6, 4, dtype=torch.float64)
    assert relational_sum(other, teacher_patches, masks, form, 0.07) > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_relational_term__slices_of_a_batch_add_up_to_it(form: Form) -> None:
    taught = teacher(has_heads=False)
    batch = student_batch(taught)
    backbone = network(1)[0]
    term = relational_term(form, 0.07)

    def loss(part: StudentBatch) -> Tensor:
        pixels = part.crops.global_crops.flatten(0, 1).float() / 255.0
        return term(backbone(pixels), backbone(pixels), part)

    cut = [batch.part(images) for images in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(loss(part) for part in cut), loss(batch), rtol=1e-6, atol=0)
    none = replace(batch, masks=PatchMasks.of(torch.zeros_like(batch.masks.flags)))
    none = replace(none, targets=replace(none.targets, patch_features=torch.zeros(0, SPEC.width)))
    assert loss(none).item() == 0.0
    assert math.isfinite(loss(batch).item())
