"""Heads in files: read from both kinds, refused with what does not fit."""

from pathlib import Path

import pytest
import torch

from distill.errors import CheckpointError
from distill.export.save import write_heads
from distill.weights.heads import has_heads, head_shapes_of, load_heads
from tests.support.weights import HEAD, folder_of, heads


def test_load_heads__from_our_file_and_from_a_training_file(tmp_path: Path) -> None:
    write_heads(tmp_path / "heads.safetensors", heads())
    theirs = {
        f"teacher.{name.replace('prototypes.weight', 'last_layer.weight')}": tensor
        for name, tensor in heads().items()
    }
    torch.save({**theirs, "student.dino_head.mlp.0.weight": torch.zeros(1)}, tmp_path / "t.pth")
    for path in (tmp_path / "heads.safetensors", tmp_path / "t.pth"):
        dino, ibot = load_heads(path, 16)
        assert dino.shape == ibot.shape == HEAD == head_shapes_of(path, 16)[0]
        assert torch.equal(dino.prototypes.weight, heads()["dino_head.prototypes.weight"])
        assert has_heads(path)
    assert not has_heads(folder_of(tmp_path / "a"))


def test_load_heads__says_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        load_heads(path, 16)
    write_heads(path, heads())
    with pytest.raises(CheckpointError, match="teacher of width 16, this teacher has width 32"):
        load_heads(path, 32)
    write_heads(path, {key: value for key, value in heads().items() if key.startswith("dino")})
    with pytest.raises(CheckpointError, match="no complete ibot_head in it"):
        load_heads(path, 16)
    write_heads(path, {**heads(), "ibot_head.mlp.2.weight": torch.zeros(3, 3)})
    with pytest.raises(
        CheckpointError, match=r"ibot_head does not fit together, first mlp\.2\.weight"
    ):
        load_heads(path, 16)
    write_heads(path, {**heads(), "ibot_head.mlp.2.bias": torch.full((12,), float("nan"))})
    with pytest.raises(
        CheckpointError, match=r"ibot_head\.mlp\.2\.bias holds numbers that are not finite"
    ):
        load_heads(path, 16)
