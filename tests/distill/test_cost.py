"""The cost model against FLOPs counted by torch on the meta device, and against the published figures."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distill.cost import CropShapes, backbone_tflops, teaching_tflops
from students.catalog import CATALOG, build_backbone
from teacher.heads import HeadShape


@pytest.mark.parametrize(
    "name", ["vits16", "vits16plus", "vitl16", "convnext_tiny", "convnext_base"]
)
def test_backbone_tflops__equal_counted_flops(name: str) -> None:
    with torch.device("meta"):
        network = build_backbone(CATALOG[name])
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
