"""The plan's bytes are those of the computation, traced without memory: within 10% for every network of the catalogue."""

import pytest
import torch

from distill.plan.flops import CropShapes
from distill.plan.memory import (
    activation_bytes,
    gradient_bytes,
    kept_by_rows,
    logit_bytes,
    row_bytes,
)
from students.shapes import CATALOG
from teacher.shapes import HeadShape
from teacher.task import StepScalars, see_crops
from tests.support.saved_bytes import (
    OBJECTIVE,
    PeakBytes,
    counting_saved,
    flash_attention,
    meta_batch,
    meta_task,
)

MASKED = 77
WITHIN = 0.1
SCALARS = StepScalars(OBJECTIVE, 1.0, 1.0)
QUICK = ("vits16", "vits16plus", "convnext_tiny")


def heads_on(width: int) -> tuple[HeadShape, HeadShape]:
    return HeadShape(width, 2048, 512, 4096), HeadShape(width, 2048, 384, 4096)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CATALOG]
)
def test_activation_bytes__are_within_a_tenth_of_what_autograd_keeps(name: str) -> None:
    spec = CATALOG[name]
    task = meta_task(spec, heads_on(spec.width), torch.bfloat16)
    for sizes in ((256, 96 if spec.stride == 32 else 112), (224, 96)):
        batch, _ = meta_batch(1, sizes, 8, MASKED, heads_on(spec.width))
        given = [*task.parameters(), batch.crops.global_crops, batch.crops.local_crops]
        with flash_attention(), counting_saved(given) as saved:
            _ = see_crops(task.backbone, batch, task.options, SCALARS)
        planned = activation_bytes(spec, CropShapes(*sizes, 8, MASKED))
        assert planned == pytest.approx(saved.total, rel=WITHIN)


def test_kept_by_rows__is_within_a_tenth_of_what_heads_keep() -> None:
    heads = heads_on(384)
    task = meta_task(CATALOG["vits16"], heads, torch.bfloat16)
    classes = torch.empty(10, 1, 384, device="meta", dtype=torch.bfloat16, requires_grad=True)
    patches = torch.empty(1, MASKED, 384, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with counting_saved([*task.parameters()]) as saved:
        _ = task.dino_head(classes), task.ibot_head(patches)
    planned = kept_by_rows(row_bytes(heads), CropShapes(256, 112, 8, MASKED))
    assert planned == pytest.approx(saved.total, rel=WITHIN)


def test_logit_bytes__is_within_a_tenth_of_what_the_loss_holds_at_once() -> None:
    """Above what it keeps for the backward pass; with three chunks of prototypes, of which the one before is gone."""
    images, heads = 4, (HeadShape(48, 8, 64, 12_288), HeadShape(48, 8, 64, 12_288))
    task = meta_task(CATALOG["vits16"], heads, torch.bfloat16)
    _, assignments = meta_batch(images, (256, 112), 8, MASKED, heads)
    shape = (1, images * MASKED, heads[1].bottleneck)
    rows = torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
    mixture = torch.empty(1, 1, device="meta")
    weights = torch.empty(images * MASKED, device="meta")
    with PeakBytes() as held:
        loss = task.ibot_head.prototypes(rows, assignments.ibot, mixture, weights)
    assert loss.dim() == 0
    planned = images * logit_bytes(CropShapes(256, 112, 8, MASKED))
    assert planned == pytest.approx(held.peak, rel=WITHIN)


def test_gradient_bytes__hold_the_bucket_of_deepspeed() -> None:
    """A network's gradients at most, and never more than 500 million of them."""
    small = gradient_bytes(10**6, 4, 1, is_added_up=False)
    assert small == 2 * 10**6 + 6 * 10**6 / 4
    added_up = gradient_bytes(10**6, 4, 1, is_added_up=True)
    assert added_up == small + 4 * 10**6
    large = gradient_bytes(2 * 10**9, 4, 2, is_added_up=True)
    assert large == 4 * 500 * 10**6 + 4 * 2 * 10**9 / 4
    assert gradient_bytes(10**6, 1, 3, is_added_up=True) == 6 * 10**6
