import math

import numpy as np
import pytest
import torch

from distill.protocols.map_scores import BINS, DepthTarget, SegTarget, score_maps
from distill.protocols.map_set import IGNORED
from tests.support.dense_data import map_set, mean_colours, nothing


def test_seg_target__mean_iou_equals_a_plain_loop() -> None:
    random = torch.Generator().manual_seed(0)
    target, classes = SegTarget(4), 4
    both, union, rows = [0] * classes, [0] * classes, []
    for _ in range(5):
        outputs = torch.randn(classes, 6, 7, generator=random)
        values = torch.randint(
            -1, classes - 1, (6, 7), generator=random
        )  # the last class is nowhere
        rows.append(target.measure(outputs, values))
        for y in range(6):
            for x in range(7):
                found, right = int(outputs[:, y, x].argmax()), int(values[y, x])
                if right == IGNORED:
                    continue
                for label in range(classes):
                    both[label] += found == label and right == label
                    union[label] += found == label or right == label
    expected = sum(b / u for b, u in zip(both, union, strict=True)) / classes
    value, resampled, _ = target.score(torch.stack(rows))
    assert value == pytest.approx(expected, abs=1e-6)
    assert resampled.quantile(0.01) < expected < resampled.quantile(0.99)


def test_seg_target__a_class_that_is_nowhere_does_not_count() -> None:
    target = SegTarget(3)
    values = torch.tensor([[0, 1]])
    rows = target.measure(torch.eye(3)[:, :2][:, None], values)
    assert target.score(rows[None])[0] == 1.0


def test_depth_target__figures_equal_a_plain_loop() -> None:
    random = np.random.default_rng(0)
    target, errors, relative, near, rows = DepthTarget(), [], [], [], []
    for _ in range(4):
        found = random.uniform(0.5, 12, (5, 6))
        right = random.uniform(0.5, 12, (5, 6)).astype(np.float32)
        right[0, 0] = 0  # not measured
        rows.append(target.measure(torch.from_numpy(found)[None], torch.from_numpy(right)))
        for one, other in zip(found.flat, right.astype(float).flat, strict=True):
            if 0.001 <= other <= 10:
                one = min(one, 10.0)
                errors.append((one - other) ** 2)
                relative.append(abs(one - other) / other)
                near.append(max(one / other, other / one) < 1.25)
    value, resampled, figures = target.score(torch.stack(rows))
    assert value == pytest.approx(math.sqrt(np.mean(errors)))
    assert figures == pytest.approx({"AbsRel": np.mean(relative), "d1": np.mean(near)})
    assert resampled.min() < value < resampled.max()


def test_depth_target__of_nyu_maps_the_crop_of_eigen_is_scored() -> None:
    right = torch.full((480, 640), 2.0)
    found = torch.full((1, 480, 640), 5.0)
    found[:, 45:471, 41:601] = 2.0
    target = DepthTarget()
    assert target.score(target.measure(found, right)[None])[0] == 0.0


def test_depth_target__bins_and_loss_are_those_of_the_definition() -> None:
    target = DepthTarget()
    outputs = torch.zeros(1, BINS, 1, 2)
    outputs[0, 100, 0, 0] = 1e6
    found = target.at_patches(outputs)
    assert found[0, 0, 0].tolist() == pytest.approx([0.001 + 9.999 * 100 / 255, 5.0005], abs=1e-2)
    metres, right = torch.tensor([[[[1.0, 2.0, 4.0]]]]), torch.tensor([[[2.0, 2.0, 0.0]]])
    logs = np.array([math.log(0.5), 0.0])
    expected = math.sqrt(logs.var() + 0.15 * logs.mean() ** 2)
    assert float(target.loss(metres, right)) == pytest.approx(expected, abs=1e-5)
    assert float(target.loss(metres, torch.zeros(1, 1, 3))) == 0.0


def test_seg_target__loss_leaves_out_what_is_ignored() -> None:
    outputs = torch.randn(1, 3, 1, 3, generator=torch.Generator().manual_seed(0))
    values = torch.tensor([[[0.0, IGNORED, 2.0]]])
    logs = outputs.log_softmax(1)
    expected = -(logs[0, 0, 0, 0] + logs[0, 2, 0, 2]) / 2
    assert float(SegTarget(3).loss(outputs, values)) == pytest.approx(float(expected), abs=1e-6)
    assert float(SegTarget(3).loss(outputs, torch.full((1, 1, 3), float(IGNORED)))) == 0.0


def test_score_maps__states_resolution_input_and_layer() -> None:
    values = np.kron(np.array([[0, 1]]), np.ones((8, 8), int)).astype(np.int16)
    pixels = np.repeat((values[..., None] * 200).astype(np.uint8), 3, axis=2)
    maps = map_set([(pixels, values)] * 2, [(pixels, values)])
    score = score_maps(mean_colours(16, 4), maps, SegTarget(2), "quick", nothing)
    assert (score.task, score.protocol, score.value, score.interval) == ("seg", "quick", 1, (1, 1))
    assert score.settings["layer"] == "ridge" and score.settings["input"] == "16 px"
