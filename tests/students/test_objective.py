"""The feature objective against plain loops in float64, its statistics, and where gradients go."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from students.convnext import ConvNeXt, init_convnext_
from students.objective import (
    VARIANCE_EPS,
    ChannelStatistics,
    FeatureNormalizer,
    FeatureTask,
    build_projectors,
    feature_sums,
)
from students.shapes import ConvNeXtSpec
from teacher.batch import CropBatch, normalise
from teacher.losses import ExtraTerm, Objective
from teacher.task import StepScalars, TaskOptions
from tests.support.tiny import IMAGES, LOCALS, MEAN, STD, network, student_batch, teacher

SCALARS = StepScalars(
    Objective(0.0, 0.0, 0.0, local=0.5, cosine=1.0, smooth_l1=0.7),
    rope_scale_global=1.0,
    rope_scale_local=1.0,
)
CPU = torch.device("cpu")


def task(backbone: nn.Module | None = None, width: int = 16) -> FeatureTask:
    projectors = build_projectors(width, 16, torch.Generator().manual_seed(3))
    own = network(1)[0] if backbone is None else backbone
    return FeatureTask(own, *projectors, TaskOptions(False, MEAN, STD), 1)


def distances(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    predicted = predicted.detach()
    cosine = 1 - predicted @ target / (predicted.norm() * target.norm())
    gaps = [abs(float(p - t)) for p, t in zip(predicted, target, strict=True)]
    losses = [0.5 * gap**2 if gap < 1 else gap - 0.5 for gap in gaps]
    return cosine, torch.tensor(sum(losses) / len(losses), dtype=torch.float64)


def test_feature_trainee__loss_equals_loops_over_images_crops_and_patches() -> None:
    taught, learner = teacher(has_heads=False).double(), task().double()
    batch = student_batch(taught)
    targets = FeatureNormalizer(16, CPU).build_targets(batch, 0.07, None)
    targets = replace(
        targets,
        class_features=targets.class_features.double(),
        patch_features=targets.patch_features.double(),
    )
    losses = learner(batch, targets, SCALARS)

    pixels = normalise(batch.crops.global_crops, MEAN, STD, torch.float64)
    local_pixels = normalise(batch.crops.local_crops, MEAN, STD, torch.float64)
    expected = torch.zeros(2, 2, dtype=torch.float64)  # [class or patch, cosine or smooth L1]
    row = 0
    for i in range(IMAGES):
        for c in range(2):
            seen = learner.backbone(pixels[i, c][None])
            own = learner.class_projector(seen.class_token[0])
            expected[0] += torch.stack(distances(own, targets.class_features[i, c]))
            masked = batch.masks.flags[i, c].nonzero().flatten().tolist()
            for patch in masked:
                own = learner.patch_projector(seen.patch_tokens[0, patch])
                parts = torch.stack(distances(own, targets.patch_features[row]))
                expected[1] += parts / (len(masked) * 2 * IMAGES)
                row += 1
        for c in range(LOCALS):
            seen = learner.backbone(local_pixels[i, c][None])
            own = learner.class_projector(seen.class_token[0])
            for t in range(2):
                expected[0] += 0.5 * torch.stack(distances(own, targets.class_features[i, t]))
    expected[0] /= IMAGES * (2 + 2 * LOCALS)
    cosine, smooth_l1 = expected.mean(dim=0).detach()
    tight = {"rtol": 1e-6, "atol": 0.0}  # normalise() and RoPE compute in fp32
    torch.testing.assert_close(losses.parts["cosine"], cosine, **tight)
    torch.testing.assert_close(losses.parts["smooth_l1"], smooth_l1, **tight)
    torch.testing.assert_close(losses.total.detach(), cosine + 0.7 * smooth_l1, **tight)


def test_feature_trainee__gradients_reach_every_trainable_parameter() -> None:
    taught, learner = teacher(has_heads=False), task()
    batch = student_batch(taught)
    learner(
        batch, FeatureNormalizer(16, CPU).build_targets(batch, 0.07, None), SCALARS
    ).total.backward()
    idle = [name for name, p in learner.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == ["backbone.embeddings.mask_token"]  # a student sees no masked input
    assert all(p.grad is None for p in taught.parameters())


def test_feature_trainee__a_convnext_is_compared_on_the_teachers_grid() -> None:
    taught = teacher(has_heads=False)
    batch = student_batch(taught)
    spec = ConvNeXtSpec((1, 1, 1), (8, 8, 12), layerscale_init=0.5)  # stride 16: a 1 x 1 map
    convnext = ConvNeXt(spec)
    init_convnext_(convnext, torch.Generator().manual_seed(0))
    no_locals = torch.zeros(IMAGES, 0, 3, 16, 16, dtype=torch.uint8)
    batch = replace(batch, crops=CropBatch(batch.crops.global_crops, no_locals))
    losses = task(convnext, 12)(
        batch, FeatureNormalizer(16, CPU).build_targets(batch, 0.07, None), SCALARS
    )
    assert losses.total.isfinite()


def test_feature_sums__is_zero_for_equal_features() -> None:
    rows = torch.randn(7, 5, dtype=torch.float64)
    cosine, distance = feature_sums(rows, rows, torch.ones(7, dtype=torch.float64))
    assert cosine.item() == pytest.approx(0.0, abs=1e-12)
    assert distance.item() == 0.0


def test_standardise__has_the_statistics_of_all_rows_so_far() -> None:
    generator = torch.Generator().manual_seed(5)
    scales = torch.tensor([1e-3, 1.0, 300.0])
    steps = [torch.randn(40, 3, generator=generator) * scales + 2 * scales for _ in range(3)]
    statistics = ChannelStatistics(3, CPU)
    for rows in steps:
        standard = statistics.standardise(rows, None)
    everything = torch.cat(steps).double()
    variance = everything.var(dim=0, correction=0) + VARIANCE_EPS
    expected = (steps[-1].double() - everything.mean(dim=0)) / variance.sqrt()
    torch.testing.assert_close(standard.double(), expected, rtol=1e-5, atol=1e-6)


def test_standardise__forgets_and_survives_constant_channels_and_empty_steps() -> None:
    statistics = ChannelStatistics(2, CPU)
    constant = torch.full((4, 2), 3.0)
    assert statistics.standardise(constant, None).abs().max() < 1e-3
    before = statistics.moments.clone()
    assert statistics.standardise(constant[:0], None).shape == (0, 2)
    assert torch.equal(statistics.moments, before)
    for _ in range(1000):
        statistics.standardise(torch.tensor([[1.0, 5.0]]), None)
    torch.testing.assert_close(
        statistics.moments[0], torch.tensor([1.0, 5.0], dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_standardiser__goes_on_from_its_state() -> None:
    taught = teacher(has_heads=False)
    batch = student_batch(taught)
    first, second = FeatureNormalizer(16, CPU), FeatureNormalizer(16, CPU)
    first.build_targets(batch, 0.07, None)
    second.load_state(first.state())
    one, two = first.build_targets(batch, 0.07, None), second.build_targets(batch, 0.07, None)
    assert torch.equal(one.class_features, two.class_features)
    assert torch.equal(one.patch_features, two.patch_features)
    assert first.state().keys() == second.state().keys()
    assert all(torch.equal(first.state()[key], tensor) for key, tensor in second.state().items())


def test_feature_task__a_term_from_outside_is_added_with_its_weight() -> None:
    taught, learner = teacher(has_heads=False), task()
    batch = student_batch(taught)
    targets = FeatureNormalizer(16, CPU).build_targets(batch, 0.07, None)
    without = learner(batch, targets, SCALARS)
    term = ExtraTerm("extra_ones", 0.5, lambda globals_, _, __: globals_.class_token.square().sum())
    learner.options = replace(learner.options, extra=(term,))
    losses = learner(batch, targets, SCALARS)
    added = (losses.total - without.total).detach()
    torch.testing.assert_close(added, 0.5 * losses.parts["extra_ones"], rtol=1e-5, atol=0)
