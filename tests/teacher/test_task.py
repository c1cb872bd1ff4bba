"""The whole objective against plain loops over images, crops and patches in float64, and where gradients go."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from teacher.batch import CropBatch, Features, PatchMasks, StudentBatch, normalise, onto
from teacher.chunks import sinkhorn
from teacher.frozen import FrozenTeacher
from teacher.losses import ExtraTerm, Objective
from teacher.task import DistillationTask, SoftAssignments, StepScalars, TaskOptions
from teacher.vit import ViT, init_vit_
from tests.support.gpu import CPU_AND_GPU
from tests.support.tiny import (
    IMAGES,
    LOCALS,
    MEAN,
    SPEC,
    STD,
    crops,
    masks,
    network,
    student_batch,
    teacher,
)


def task(*, masks_input: bool = False) -> DistillationTask:
    return DistillationTask(
        *network(1), TaskOptions(masks_input, MEAN, STD), None, 1, koleo_is_local=True
    )


def assignments(batch: StudentBatch, taught: FrozenTeacher) -> SoftAssignments:
    rows = batch.targets.class_features.transpose(0, 1).flatten(0, 1)
    return SoftAssignments(
        sinkhorn(rows, taught.dino_head.prototypes.weight, 0.07),
        sinkhorn(batch.targets.patch_features, taught.ibot_head.prototypes.weight, 0.07),
    )


def ce(bottleneck: Tensor, prototypes: Tensor, target: Tensor) -> Tensor:
    return -(target * torch.log_softmax(prototypes @ bottleneck / 0.1, 0)).sum()


@pytest.mark.parametrize("has_heads", [True, False])
@pytest.mark.parametrize("scale", [0.5, 0.75])
def test_teach__on_shrunk_crops_equals_crops_shrunk_by_hand(scale: float, has_heads: bool) -> None:
    side = round(16 / scale) if scale == 0.5 else 32
    draw = torch.Generator().manual_seed(3)
    full = torch.randint(0, 256, (IMAGES, 2, 3, side, side), dtype=torch.uint8, generator=draw)
    batch = CropBatch(full, full[:, :, :, :8, :8])
    grid = round(side * scale) // 8
    flags = torch.rand(IMAGES, 2, grid * grid, generator=draw) < 0.4
    taught = teacher(IMAGES, has_heads=has_heads, crop_scale=scale)
    targets = taught.teach(batch, PatchMasks.of(flags))
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255.0 for values in (MEAN, STD))
    pixels = ((full.float() - mean) / std).flatten(0, 1)
    hw = (round(side * scale),) * 2
    by_hand = nn.functional.interpolate(pixels, hw, mode="bilinear", antialias=True)
    features = taught.backbone(by_hand)
    rows = features.patch_tokens.flatten(0, 1)[flags.flatten()]
    tokens = features.class_token
    if taught.dino_head is not None and taught.ibot_head is not None:
        tokens, rows = taught.dino_head(tokens), taught.ibot_head(rows)
    assert torch.equal(targets.class_features.flatten(0, 1), tokens)
    torch.testing.assert_close(targets.patch_features, rows, rtol=1e-6, atol=1e-7)
    if not has_heads:
        assert torch.equal(targets.patch_features, rows)
    small = teacher(2, has_heads=has_heads, crop_scale=scale)
    small.pad_forwards(11)  # empty passes, and a last one that is padded
    alone = [
        small.teach(
            CropBatch(full[i : i + 1], full[:1, :, :, :8, :8]), PatchMasks.of(flags[i : i + 1])
        )
        for i in range(IMAGES)
    ]
    divided = small.teach(batch, PatchMasks.of(flags))
    assert torch.equal(torch.cat([each.class_features for each in alone]), divided.class_features)
    assert torch.equal(torch.cat([each.patch_features for each in alone]), divided.patch_features)


def test_normalise__by_each_images_own_colours() -> None:
    crops = torch.randint(0, 256, (3, 2, 3, 4, 4), dtype=torch.uint8)
    alike = torch.tensor([MEAN, STD]).expand(3, 2, 3)
    same = normalise(crops, MEAN, STD, torch.float32)
    assert torch.equal(normalise(crops, (0, 0, 0), (1, 1, 1), torch.float32, alike), same)
    pixel_stats = torch.rand(3, 2, 3) + 0.1
    together = normalise(crops, MEAN, STD, torch.float32, pixel_stats)
    for image in range(3):
        mean, std = pixel_stats[image].tolist()
        torch.testing.assert_close(
            together[image], normalise(crops[image], mean, std, torch.float32)
        )


@pytest.mark.parametrize(("masks_input", "size"), [(False, 16), (True, 16), (False, 2)])
def test_task__parts_that_cut_a_koleo_group_add_up_to_the_slice(
    masks_input: bool, size: int
) -> None:
    taught, learner = teacher().double(), task(masks_input=masks_input).double()
    learner.options = replace(learner.options, koleo_group=size)
    batch = student_batch(taught)
    targets = assignments(batch, taught)
    scalars = StepScalars(Objective(dino=1.0, ibot=0.7, koleo=10.0, local=0.5), 1.1, 0.9)
    together = learner(batch, targets, scalars)
    together.total.backward()
    wanted = {name: each.grad for name, each in learner.named_parameters()}
    learner.zero_grad()
    cuts = [slice(0, 1), slice(1, 3), slice(3, IMAGES)]
    koleo = learner.koleo_before(batch, cuts, scalars)
    total = 0.0
    for cut in cuts:
        its_targets = targets.part(cut, batch.masks.masked(cut))
        losses = learner(batch.part(cut), its_targets, scalars, koleo.part(cut))
        losses.total.backward()
        total += losses.total.item()
    assert total == pytest.approx(together.total.item(), rel=1e-6)
    for name, each in learner.named_parameters():
        grad = wanted[name]
        if grad is not None:
            largest = float(grad.abs().max())
            torch.testing.assert_close(each.grad, grad, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("size", [2, 3, 16])
def test_task__koleo_compares_the_images_of_a_group_of_any_size(size: int) -> None:
    taught, learner = teacher().double(), task().double()
    learner.options = replace(learner.options, koleo_group=size)
    batch = student_batch(taught)
    scalars = StepScalars(Objective(1.0, 0.0, 0.1, 1.0), 1.0, 1.0)
    losses = learner(batch, assignments(batch, taught), scalars)
    pixels = normalise(batch.crops.global_crops, MEAN, STD, torch.float64)
    expected = 0.0
    for crop in range(2):
        unit = nn.functional.normalize(learner.backbone(pixels[:, crop]).class_token, dim=1)
        for i in range(IMAGES):
            others = [j for j in range(IMAGES) if j != i and j // size == i // size]
            if others:
                nearest = min((unit[i] - unit[j]).norm().item() for j in others)
                expected -= math.log(nearest) / IMAGES
    assert losses.parts["koleo"].item() == pytest.approx(expected, rel=1e-5)  # RoPE is in fp32


def test_task__loss_equals_loops_over_images_crops_and_patches() -> None:
    taught, learner = teacher().double(), task().double()
    taught.use_anchor(network(3)[0].double())
    batch = student_batch(taught)
    targets = assignments(batch, taught)
    weights = Objective(dino=1.0, ibot=0.7, koleo=0.1, local=0.5, gram=2.0)
    losses = learner(batch, targets, StepScalars(weights, 1.0, 1.0))

    pixels = normalise(batch.crops.global_crops, MEAN, STD, torch.float64)
    local_pixels = normalise(batch.crops.local_crops, MEAN, STD, torch.float64)
    p = targets.dino.columns(0, 20).view(2, IMAGES, 20)
    q = targets.ibot.columns(0, 20)
    seen = [[learner.backbone(pixels[i, c][None]) for c in range(2)] for i in range(IMAGES)]
    expected_dino, expected_ibot, expected_gram = (
        torch.zeros((), dtype=torch.float64) for _ in range(3)
    )
    row = 0
    for i in range(IMAGES):
        students = [learner.dino_head(seen[i][c].class_token[0]) for c in range(2)]
        students += [
            learner.dino_head(learner.backbone(local_pixels[i, c][None]).class_token[0])
            for c in range(LOCALS)
        ]
        for s, student in enumerate(students):
            for t in range(2):
                if s != t:
                    weight = 1.0 if s < 2 else weights.local
                    expected_dino += weight * ce(
                        student, learner.dino_head.prototypes.weight, p[t, i]
                    )
        for c in range(2):
            total, count = 0.0, int(batch.masks.flags[i, c].sum())
            for patch in batch.masks.flags[i, c].nonzero().flatten().tolist():
                student = learner.ibot_head(seen[i][c].patch_tokens[0, patch])
                total = total + ce(student, learner.ibot_head.prototypes.weight, q[row]) / count
                row += 1
            expected_ibot = expected_ibot + total / (2 * IMAGES)
            a = nn.functional.normalize(seen[i][c].patch_tokens[0], dim=1)
            b = nn.functional.normalize(batch.targets.anchor_patches[i, c], dim=1)
            expected_gram = expected_gram + ((a @ a.T - b @ b.T) ** 2).mean() / (2 * IMAGES)
    expected_dino = expected_dino / (IMAGES * (2 + 2 * LOCALS))
    assert row == len(q)
    tight = {"rtol": 1e-6, "atol": 0.0}  # normalise() and RoPE compute in fp32
    torch.testing.assert_close(losses.parts["dino"], expected_dino.detach(), **tight)
    torch.testing.assert_close(losses.parts["ibot"], expected_ibot.detach(), **tight)
    torch.testing.assert_close(losses.parts["gram"], expected_gram.detach(), **tight)
    parts = losses.parts
    total = parts["dino"] + 0.7 * parts["ibot"] + 0.1 * parts["koleo"] + 2.0 * parts["gram"]
    torch.testing.assert_close(losses.total.detach(), total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("masks_input", [False, True])
def test_task__gradients_reach_every_trainable_parameter_and_no_frozen_one(
    masks_input: bool,
) -> None:
    taught, learner = teacher(), task(masks_input=masks_input)
    taught.use_anchor(network(3)[0].requires_grad_(False))
    batch = student_batch(taught)
    losses = learner(
        batch,
        assignments(batch, taught),
        StepScalars(Objective(1.0, 1.0, 0.1, 1.0, 2.0), 1.0, 1.0),
    )
    losses.total.backward()
    idle = [name for name, p in learner.named_parameters() if p.grad is None or not p.grad.any()]
    # the mask token is unused where the input is not masked
    assert idle == ([] if masks_input else ["backbone.embeddings.mask_token"])
    assert all(p.grad is None and not p.requires_grad for p in taught.parameters())
    assert all(p.grad is None for p in taught.anchor.parameters())


def test_task__a_zero_weight_leaves_the_term_out() -> None:
    taught = teacher()
    batch = student_batch(taught)
    losses = task()(
        batch, assignments(batch, taught), StepScalars(Objective(1.0, 0.0, 0.0, 1.0), 1.0, 1.0)
    )
    assert set(losses.parts) == {"dino"}


def spread(globals_: Features, locals_: Features, batch: StudentBatch) -> Tensor:
    both = torch.cat([globals_.class_token, locals_.class_token])
    return both.square().sum() / batch.images_global


def test_task__a_term_from_outside_is_added_with_its_weight() -> None:
    taught, learner = teacher(), task()
    batch = student_batch(taught)
    targets = assignments(batch, taught)
    scalars = StepScalars(Objective(1.0, 0.7, 0.1, 1.0), 1.0, 1.0)
    without = learner(batch, targets, scalars)
    learner.options = replace(learner.options, extra=(ExtraTerm("extra_spread", 0.25, spread),))
    losses = learner(batch, targets, scalars)
    assert losses.parts.keys() - without.parts.keys() == {"extra_spread"}
    assert all(torch.equal(losses.parts[name], part) for name, part in without.parts.items())
    added = (losses.total - without.total).detach()
    torch.testing.assert_close(added, 0.25 * losses.parts["extra_spread"], rtol=1e-5, atol=0)
    only = torch.autograd.grad(losses.total - without.total, learner.backbone.norm.weight)[0]
    assert only.abs().sum() > 0


def test_task__a_coarser_map_is_compared_on_the_teachers_grid() -> None:
    taught = teacher()
    batch = student_batch(taught)
    coarse = replace(SPEC, patch=16)
    vit = ViT(coarse)
    init_vit_(vit, torch.Generator().manual_seed(1))
    pixels_16 = CropBatch(
        batch.crops.global_crops, torch.zeros(IMAGES, 0, 3, 16, 16, dtype=torch.uint8)
    )
    batch = replace(batch, crops=pixels_16)
    learner = DistillationTask(
        vit, *network(1)[1:], TaskOptions(False, MEAN, STD), None, 1, koleo_is_local=True
    )
    losses = learner(
        batch, assignments(batch, taught), StepScalars(Objective(1.0, 1.0, 0.0, 1.0), 1.0, 1.0)
    )
    assert losses.total.isfinite()


@CPU_AND_GPU
def test_teach__does_not_depend_on_how_many_images_a_rank_has(device: str) -> None:
    where = torch.device(device)
    taught = teacher(micro_images=4).to(where, torch.float32 if device == "cpu" else torch.bfloat16)
    batch, drawn = crops(), PatchMasks.of(masks()).to(where)
    batch = CropBatch(onto(batch.global_crops, where), onto(batch.local_crops, where))
    whole = taught.teach(batch, drawn)
    for border in (1, 2, 4):
        first = taught.teach(
            CropBatch(batch.global_crops[:border], batch.local_crops[:border]),
            drawn.part(slice(0, border)),
        )
        second = taught.teach(
            CropBatch(batch.global_crops[border:], batch.local_crops[border:]),
            drawn.part(slice(border, None)),
        )
        assert torch.equal(
            whole.class_features, torch.cat([first.class_features, second.class_features])
        )
        assert torch.equal(
            whole.patch_features, torch.cat([first.patch_features, second.patch_features])
        )


@pytest.mark.parametrize("images", [0, 1, 5])
def test_teach__one_forward_per_image(images: int) -> None:
    taught, seen = teacher(micro_images=1), []
    taught.backbone.register_forward_hook(
        lambda module, inputs, output: seen.append(inputs[0].shape[0])
    )
    targets = taught.teach(crops(images), PatchMasks.of(masks(5)[:images]))
    assert seen == [2] * images  # both global crops of one image at a time
    assert targets.class_features.shape == (images, 2, 6)
    assert targets.patch_features.shape == (int(masks(5)[:images].sum()), 6)
