"""What files beside weights state about their images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.errors import CheckpointError
from distill.export.convert import convert
from distill.weights.hf_config import preprocessor_config
from distill.weights.inspect import inspect
from distill.weights.stated_inputs import SATELLITE_MEAN, SATELLITE_STD, StatedInputs, stated_inputs
from tests.support.weights import VIT, folder_of, random_weights, translate

MEAN, STD = (0.25, 0.5, 0.75), (0.2, 0.3, 0.4)
USUAL = preprocessor_config(64, MEAN, STD)


@pytest.mark.parametrize(
    ("changes", "size", "mean", "std"),
    [
        ({}, 64, MEAN, STD),
        ({"size": {"shortest_edge": 256}}, 256, MEAN, STD),
        ({"size": 96}, 96, MEAN, STD),
        ({"size": None}, None, MEAN, STD),
        ({"size": {"max_pixels": 9}}, None, MEAN, STD),
        ({"do_center_crop": True, "crop_size": {"height": 48, "width": 48}}, 48, MEAN, STD),
        ({"do_normalize": False}, 64, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ({"do_rescale": False, "image_mean": [51.0] * 3, "image_std": [255.0] * 3}, 64, (0.2,) * 3, (1.0,) * 3),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, 64, (0.5,) * 3, (0.5,) * 3),
    ],
)  # fmt: skip
def test_stated_inputs__of_a_processor(
    changes: dict[str, Any], size: int | None, mean: Any, std: Any, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**USUAL, **changes}))
    for weights in (tmp_path, tmp_path / "model.safetensors"):
        found = stated_inputs(weights)
        assert found.source == "preprocessor_config.json" and found.size == size
        assert found.mean == pytest.approx(mean) and found.std == pytest.approx(std)
    if not changes:
        assert (found.mean, found.std) == (MEAN, STD)  # no digit is lost


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_mean": [0.5]}, r"image_mean = \[0.5\] cannot be used"),
        ({"image_mean": 0.5}, "image_mean = 0.5 cannot be used"),
        ({"image_mean": ["a", "b", "c"]}, "image_mean = .* cannot be used"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std = .* cannot be used"),
        ({"image_std": None}, "image_std = None cannot be used"),
        ({"rescale_factor": 0}, "rescale_factor = 0 cannot be used"),
        ({"size": "big"}, "size = 'big' cannot be used"),
    ],
)
def test_stated_inputs__refuses_what_no_network_can_use(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**USUAL, **changes}))
    with pytest.raises(CheckpointError, match=told):
        stated_inputs(tmp_path)


def test_stated_inputs__of_timm_of_names_and_of_nothing(tmp_path: Path) -> None:
    config = {"mean": list(MEAN), "std": list(STD), "input_size": [3, 256, 256]}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": config}))
    assert stated_inputs(tmp_path) == StatedInputs(256, MEAN, STD, "config.json")
    (tmp_path / "config.json").write_text("{}")
    assert stated_inputs(tmp_path) == StatedInputs()
    for name in ("dinov3_vitl16_pretrain_sat493m-x.pth", "renamed-eadcf0ff.pth"):
        found = stated_inputs(tmp_path / name)
        assert (found.mean, found.std) == (SATELLITE_MEAN, SATELLITE_STD)
    assert stated_inputs(tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth").mean is None


def test_convert__keeps_what_is_stated(tmp_path: Path) -> None:
    satellite = tmp_path / "dinov3_x_pretrain_sat493m-0.pth"
    torch.save(translate(random_weights(VIT), VIT, "hf", "meta"), satellite)
    convert(satellite, tmp_path / "hf", layout="hf", dtype=None)
    assert stated_inputs(tmp_path / "hf").mean == SATELLITE_MEAN
    assert any("0.411" in note for note in inspect(tmp_path / "hf").notes)
    folder = folder_of(tmp_path / "silent")
    (folder / "preprocessor_config.json").unlink()
    convert(folder, tmp_path / "again", layout="hf", dtype=None)
    assert stated_inputs(tmp_path / "again") == StatedInputs()
