import json
from pathlib import Path

import pytest
import torch

from distill.export.save import (
    ExportFacts,
    fingerprint,
    write_backbone,
    write_heads,
    write_tensors,
)
from distill.weights.heads import load_heads
from distill.weights.hf_config import hf_config
from distill.weights.load import load_backbone
from students.shapes import ConvNeXtSpec
from teacher.heads import Head, init_head_
from teacher.shapes import HeadShape, ViTSpec

VIT = ViTSpec(width=16, depth=1, heads=2, ffn_width=32, patch=8, ffn="swiglu")
CONVNEXT = ConvNeXtSpec((1, 1, 1), (8, 12, 16))
FACTS = ExportFacts(64, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), {"recipe": "test", "steps": 3})


def weights_of(spec: ViTSpec | ConvNeXtSpec) -> dict[str, torch.Tensor]:
    backbone = spec.build()
    spec.init_(backbone, torch.Generator().manual_seed(0))
    return backbone.state_dict()


@pytest.mark.parametrize("spec", [VIT, CONVNEXT])
def test_write_backbone__reads_back_the_same(spec: ViTSpec | ConvNeXtSpec, tmp_path: Path) -> None:
    weights = weights_of(spec)
    write_backbone(tmp_path, {**weights, "local_cls_norm.weight": torch.ones(16)}, spec, FACTS)
    backbone, read = load_backbone(tmp_path)
    assert (read.width, read.stride) == (spec.width, spec.stride)
    assert fingerprint(backbone.state_dict()) == fingerprint(weights)
    assert json.loads((tmp_path / "distill.json").read_text())["recipe"] == "test"
    assert "AutoModel" in (tmp_path / "README.md").read_text()
    assert not list(tmp_path.glob(".*"))


def test_write_tensors__shards_and_their_index(tmp_path: Path) -> None:
    weights = weights_of(VIT)
    write_tensors(tmp_path, weights, shard_bytes=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert index["weight_map"].keys() == weights.keys()
    (tmp_path / "config.json").write_text(json.dumps(hf_config(VIT)))
    backbone, _ = load_backbone(tmp_path)
    assert fingerprint(backbone.state_dict()) == fingerprint(weights)


def heads(width: int = 16) -> dict[str, torch.Tensor]:
    tensors = {}
    for name in ("dino_head", "ibot_head"):
        head = Head(HeadShape(width=width, hidden=12, bottleneck=6, prototypes=20))
        init_head_(head, torch.Generator().manual_seed(1))
        tensors |= {f"{name}.{key}": value for key, value in head.state_dict().items()}
    return tensors


def test_write_heads__reads_back_the_same(tmp_path: Path) -> None:
    write_heads(tmp_path / "heads.safetensors", {**heads(), "backbone.norm.weight": torch.ones(16)})
    dino, ibot = load_heads(tmp_path / "heads.safetensors", 16)
    assert dino.shape == ibot.shape == HeadShape(16, 12, 6, 20)
    assert torch.equal(dino.prototypes.weight, heads()["dino_head.prototypes.weight"])
