"""A run folder as the launcher leaves it, to score: three classes of noise that differ in colour, and networks that learned nothing."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distill.data.build_index import build_index
from distill.data.index import ImageIndex
from distill.export.save import ExportFacts, write_backbone
from distill.protocols.images import Scored
from students.shapes import BackboneSpec, ConvNeXtSpec
from teacher.shapes import ViTSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")
TINY_VIT = ViTSpec(width=16, depth=1, heads=2, ffn_width=32, patch=8)
TINY_CONVNEXT = ConvNeXtSpec(depths=(1, 1), widths=(8, 16))


def write_splits(folder: Path, counts: tuple[int, int]) -> tuple[ImageIndex, ImageIndex]:
    """Three classes of 16 px noise that differ in colour only, so many training and held-out images of each."""
    random = np.random.default_rng(0)
    for split, count in zip(("train", "held_out"), counts, strict=True):
        for channel, name in enumerate(("blue", "green", "red")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                tile = random.integers(0, 120, (16, 16, 3), dtype=np.uint8)
                tile[..., 2 - channel] += 120
                Image.fromarray(tile).save(folder / split / name / f"{number}.png")
    return (
        build_index([folder / "train"], max_bad_fraction=0.0),
        build_index([folder / "held_out"], max_bad_fraction=0.0),
    )


def export(folder: Path, spec: BackboneSpec, size: int) -> None:
    backbone = spec.build()
    spec.init_(backbone, torch.Generator().manual_seed(1))
    write_backbone(folder, backbone.state_dict(), spec, ExportFacts(size, MEAN, STD, {}))


def write_run(tmp_path: Path, splits: tuple[ImageIndex, ImageIndex]) -> Path:
    """The run folder of a teacher and two students."""
    (tmp_path / "data").mkdir()
    splits[0].save(tmp_path / "data" / "train")
    splits[1].save(tmp_path / "data" / "held_out")
    export(tmp_path / "teacher", TINY_VIT, 16)
    export(tmp_path / "students" / "vit", TINY_VIT, 16)
    export(tmp_path / "students" / "conv", TINY_CONVNEXT, 32)
    return tmp_path


def scored(index: ImageIndex) -> Scored:
    assert index.labels is not None
    labels = torch.from_numpy(np.asarray(index.labels).astype(np.int64))
    return Scored([index.location(image) for image in range(len(index))], labels)
