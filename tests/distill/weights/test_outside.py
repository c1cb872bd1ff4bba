"""Vision networks of transformers from a folder; a text model, a broken folder and ours."""

from pathlib import Path
from typing import Any

import pytest
import torch

from distill.errors import CheckpointError
from distill.evaluate.patch_maps import patch_features
from distill.protocols.images import Preparation
from distill.weights.outside import is_outside, load_outside
from tests.support.outside import SMALL, write_outside
from tests.support.pictures import picture
from tests.support.scored_run import TINY_VIT, export

PREPARED = Preparation(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(("name", "width", "stride"), SMALL)
def test_load_outside__gives_patches_on_the_grid_at_any_size(
    tmp_path: Path, name: str, width: int, stride: int
) -> None:
    folder, model = write_outside(tmp_path / name, name)
    assert is_outside(folder)
    network = load_outside(folder)
    assert (network.width, network.stride) == (width, stride)
    pixels = picture(0, 2 * stride * 4, 3 * stride * 4)
    patches = patch_features(network, pixels, PREPARED)
    assert patches.shape == (8, 12, width)
    assert torch.equal(patch_features(load_outside(folder), pixels, PREPARED), patches)
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1.0
    vision: Any = getattr(model, "vision_model", model)
    options = {} if name != "siglip" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        hidden = vision(pixel_values=image, **options).last_hidden_state
    hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden[:, -96:]
    torch.testing.assert_close(patches.flatten(0, 1), hidden[0], atol=1e-4, rtol=1e-4)


def test_load_outside__prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, _ = write_outside(tmp_path / "siglip", "siglip")
    capfd.readouterr()
    load_outside(folder)
    assert capfd.readouterr() == ("", "")


def test_load_outside__a_text_model_is_refused_in_one_line(tmp_path: Path) -> None:
    folder, _ = write_outside(tmp_path / "bert", "bert")
    with pytest.raises(CheckpointError, match="not a vision backbone") as caught:
        load_outside(folder)
    assert "\n" not in caught.value.message


def test_load_outside__a_folder_without_weights(tmp_path: Path) -> None:
    folder, _ = write_outside(tmp_path / "dinov2", "dinov2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_outside(folder)


def test_is_outside__not_ours(tmp_path: Path) -> None:
    export(tmp_path / "ours", TINY_VIT, 16)
    assert not is_outside(tmp_path / "ours") and not is_outside(tmp_path)
