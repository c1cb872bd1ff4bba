import json
from pathlib import Path

import pytest
import torch

from distill.errors import CheckpointError
from distill.export import (
    ExportFacts,
    fingerprint,
    read_backbone,
    read_heads,
    write_backbone,
    write_heads,
)
from students.catalog import build_backbone, init_weights_
from students.convnext import ConvNeXtSpec
from teacher.heads import Head, HeadShape, init_head_
from teacher.vit import ViTSpec

VIT = ViTSpec(width=16, depth=1, heads=2, ffn_width=32, patch=8, ffn="swiglu")
CONVNEXT = ConvNeXtSpec((1, 1, 1), (8, 12, 16))
FACTS = ExportFacts(64, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), {"recipe": "test", "steps": 3})


def weights_of(spec: ViTSpec | ConvNeXtSpec) -> dict[str, torch.Tensor]:
    backbone = build_backbone(spec)
    init_weights_(backbone, torch.Generator().manual_seed(0))
    return backbone.state_dict()


@pytest.mark.parametrize("spec", [VIT, CONVNEXT])
def test_write_backbone__reads_back_the_same(spec: ViTSpec | ConvNeXtSpec, tmp_path: Path) -> None:
    weights = weights_of(spec)
    write_backbone(tmp_path, {**weights, "local_cls_norm.weight": torch.ones(16)}, spec, FACTS)
    backbone, read = read_backbone(tmp_path)
    assert (read.width, read.stride) == (spec.width, spec.stride)
    assert fingerprint(backbone.state_dict()) == fingerprint(weights)
    assert json.loads((tmp_path / "distill.json").read_text())["recipe"] == "test"
    assert "AutoModel" in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))


def test_read_backbone__says_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        read_backbone(tmp_path)
    write_backbone(tmp_path, weights_of(VIT), VIT, FACTS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(
        CheckpointError,
        match=r"19 tensors do not fit config.json, first layer.1.attention.k_proj.weight",
    ):
        read_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(CheckpointError, match="model_type = 'bert'"):
        read_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_backbone(tmp_path)


def heads(width: int = 16) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in ("dino_head", "ibot_head"):
        head = Head(HeadShape(width=width, hidden=12, bottleneck=6, prototypes=20))
        init_head_(head, torch.Generator().manual_seed(1))
        tensors |= {f"{name}.{key}": value for key, value in head.state_dict().items()}
    return tensors


def test_write_heads__reads_back_the_same(tmp_path: Path) -> None:
    write_heads(tmp_path / "heads.safetensors", {**heads(), "backbone.norm.weight": torch.ones(16)})
    dino, ibot = read_heads(tmp_path / "heads.safetensors", 16)
    assert dino.shape == ibot.shape == HeadShape(16, 12, 6, 20)
    assert torch.equal(dino.prototypes.weight, heads()["dino_head.prototypes.weight"])


def test_read_heads__says_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "heads.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        read_heads(path, 16)
    write_heads(path, heads())
    with pytest.raises(
        CheckpointError, match="heads for a teacher of width 16, this teacher has width 32"
    ):
        read_heads(path, 32)
    write_heads(path, {key: value for key, value in heads().items() if key.startswith("dino")})
    with pytest.raises(CheckpointError, match="no complete ibot_head in it"):
        read_heads(path, 16)
    path.write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match=r"heads\.safetensors"):
        read_heads(path, 16)
