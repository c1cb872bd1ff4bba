"""Estimates before the work: operations and memory of what is known, two timings of what is not."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.evaluate.forward_cost import CostModel, available_bytes, square_px
from distill.plan.flops import backbone_tflops
from students.shapes import BackboneSpec, ConvNeXtSpec
from teacher.shapes import ViTSpec
from tests.support.scored_run import CPU

SPECS: dict[str, BackboneSpec] = {
    "vit": ViTSpec(width=64, depth=2, heads=2, ffn_width=256, patch=8),
    "wide": ViTSpec(width=32, depth=2, heads=2, ffn_width=512, patch=8),
    "swiglu": ViTSpec(width=64, depth=2, heads=2, ffn_width=256, patch=8, ffn="swiglu"),
    "convnext": ConvNeXtSpec(depths=(2, 2), widths=(16, 32)),
}


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were made inside and lived at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self.num_bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                key = storage.data_ptr()
                if key and key not in self._alive:
                    self._alive[key] = storage.nbytes()
                    weakref.finalize(storage, self._alive.pop, key, None)
        self.num_bytes = max(self.num_bytes, sum(self._alive.values()))
        return found


@pytest.mark.parametrize("name", SPECS)
def test_forward_bytes__are_near_what_a_forward_pass_holds(name: str) -> None:
    spec, side = SPECS[name], 256
    backbone = spec.build().eval()
    with torch.inference_mode(), Peak() as peak:
        backbone(torch.zeros(1, 3, side, side))
    assert 0.8 < spec.forward_bytes(side) / peak.num_bytes < 1.5


@pytest.mark.parametrize("name", SPECS)
def test_cost_model__operations_are_the_plans_and_time_is_in_proportion(name: str) -> None:
    spec = SPECS[name]
    model = CostModel(spec.build().eval(), spec, 64, CPU)
    one, four = model.of([(128, 128)]), model.of([(128, 128)] * 4)
    assert one.tflop == backbone_tflops(spec, 128)
    assert four.tflop == pytest.approx(4 * one.tflop)
    assert four.seconds == pytest.approx(4 * one.seconds) and one.seconds > 0
    assert four.num_bytes == one.num_bytes > spec.forward_bytes(128)


def test_cost_model__of_an_unknown_network_grows_at_least_with_its_patches() -> None:
    backbone = SPECS["vit"].build().eval()
    for largest in (64, 448):
        model = CostModel(backbone, None, largest, CPU)
        small, large = model.of([(224, 224)]), model.of([(448, 448)])
        assert small.tflop is None
        assert 4 * small.seconds <= large.seconds * 1.001 <= 16.1 * small.seconds
        assert large.num_bytes > small.num_bytes


def test_square_px__has_as_many_pixels() -> None:
    assert square_px((512, 512)) == 512
    assert square_px((256, 1024)) == 512


def test_available_bytes__is_at_most_what_a_container_has_left(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.evaluate.forward_cost.CGROUP", tmp_path)
    free = available_bytes(CPU)
    assert free > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_bytes(CPU) > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_bytes(CPU) == 4000
