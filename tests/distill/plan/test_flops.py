"""The cost model against FLOPs counted by torch on the meta device, and against the published figures."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.data.mask_counts import mean_masked
from distill.errors import PlanError
from distill.plan.flops import (
    CropShapes,
    backbone_tflops,
    find_device,
    fitting_tflops,
    regression_tflops,
    teaching_tflops,
    training_tflops,
)
from students.shapes import CATALOG
from teacher.shapes import HeadShape


@pytest.mark.parametrize(
    "name", ["vits16", "vits16plus", "vitl16", "convnext_tiny", "convnext_base"]
)
def test_backbone_tflops__equal_counted_flops(name: str) -> None:
    with torch.device("meta"):
        network = CATALOG[name].build()
        pixels = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        network(pixels)
    assert backbone_tflops(CATALOG[name], 224) * 1e12 == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


def test_teaching_tflops__the_7b_costs_what_was_published() -> None:
    """7.10 teraflops per image pair at 256 px."""
    dino, ibot = HeadShape(4096, 8192, 512, 262_144), HeadShape(4096, 8192, 384, 98_304)
    crops = CropShapes(256, 112, 8, 77.0)
    assert teaching_tflops(CATALOG["vit7b16"], (dino, ibot), crops) == pytest.approx(7.10, rel=0.02)


PUBLISHED = {  # teraflops per image pair of one training step, METHOD section 5; given to two decimals
    "vits16": 0.18,
    "vits16plus": 0.22,
    "vitb16": 0.55,
    "vitl16": 1.83,
    "vith16plus": 4.93,
    "convnext_tiny": 0.17,
    "convnext_small": 0.28,
    "convnext_base": 0.47,
    "convnext_large": 0.99,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_training_tflops__are_the_published_ones(name: str) -> None:
    spec = CATALOG[name]
    heads = (
        HeadShape(spec.width, 2048, 512, 262_144),
        HeadShape(spec.width, 2048, 384, 98_304),
    )
    crops = CropShapes(256, 112, 8, mean_masked((16, 16), probability=0.5, ratio=(0.1, 0.5)))
    found = training_tflops(spec, heads, crops)
    # measured: within 0.9%, but for ConvNeXt-S: 0.2854 against a published 0.28, 1.9%
    assert found == pytest.approx(PUBLISHED[name], rel=0.02)


def test_regression_tflops__are_backbone_and_projectors() -> None:
    spec = CATALOG["vits16"]
    crops = CropShapes(256, 112, 8, 77.0)
    backbone = 2 * backbone_tflops(spec, 256) + 8 * backbone_tflops(spec, 112)
    rows = 10 + 77
    assert regression_tflops(spec, 1024, crops) == pytest.approx(
        3 * (backbone + 2 * rows * 384 * 1024 / 1e12), rel=0.01
    )


def test_fitting_tflops__are_less_than_training() -> None:
    spec = CATALOG["vitl16"]
    heads = HeadShape(1024, 2048, 512, 262_144), HeadShape(1024, 2048, 384, 98_304)
    crops = CropShapes(256, 112, 8, 77.0)
    assert fitting_tflops(spec, heads, crops) < training_tflops(spec, heads, crops)


def test_find_device__by_name_or_measured() -> None:
    assert find_device("h200").memory_gib == 141
    measured = find_device("measured")
    assert measured.tflops_per_s > 0 and measured.memory_gib > 0
    with pytest.raises(PlanError, match="--device tpu: not known"):
        find_device("tpu")
