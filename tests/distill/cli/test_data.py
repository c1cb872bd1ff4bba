"""The data verbs, through the command line."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.command import Run
from tests.support.pictures import picture

RECIPE = """\
name: tiny
model: {arch: vit, width: 16, depth: 1, heads: 2, patch: 8}
data: {sources: [{path: SOURCE}]}
crops: {global: 32, local: {size: 16, count: 2}}
schedule: {batch: 4, lr: {peak: 1e-3}}
stages: [{name: base, steps: 2}, {name: gram, steps: 2, gram: {teacher: base@1}}]
"""


def images(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.fromarray(picture(number)).save(folder / f"{number}.jpg")
    return folder


def recipe(tmp_path: Path, source: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.replace("SOURCE", json.dumps(str(source))))
    return str(path)


def test_check__tells_what_is_there_and_what_is_broken(distill: Run, tmp_path: Path) -> None:
    folder = images(tmp_path / "images")
    result = distill("data", "check", str(folder))
    assert result.code == 0 and "JPEG 6" in result.out and "48" in result.out
    (folder / "x.png").write_bytes(b"")
    result = distill("data", "check", str(folder), "--json")
    (dataset,) = json.loads(result.out)
    assert result.code == 1 and [row["reason"] for row in dataset["broken"]] == ["empty file"]
    result = distill("data", "check", str(tmp_path / "none"))
    assert result.code == 2 and "no such file or folder" in result.err


def test_check__counts_pictures_that_are_perhaps_not_meant(distill: Run, tmp_path: Path) -> None:
    folder = images(tmp_path / "images")
    clear = np.zeros((48, 64, 4), np.uint8)
    clear[:24, :, 3] = 255
    Image.fromarray(clear).save(folder / "clear.png")
    Image.new("RGB", (64, 48), (90, 80, 200)).save(folder / "flat.png")
    Image.fromarray(picture(1, 20, 200)).save(folder / "small.png")
    camera = np.asarray(Image.fromarray(picture(2)).convert("L")).astype(np.uint16) * 16
    Image.fromarray(camera).save(folder / "camera.png")  # 12 bits in 16
    result = distill("data", "check", str(folder), "--json")
    (dataset,) = json.loads(result.out)
    found = {
        name: (remark["count"], Path(remark["example"]).name)
        for name, remark in dataset["remarkable"].items()
    }
    assert result.code == 0 and found == {
        "transparent": (1, "clear.png"),
        "nearly one colour": (1, "flat.png"),
        "very small": (1, "small.png"),
        "very dark": (1, "camera.png"),
    }
    shown = distill("data", "check", str(folder)).out
    assert all(name in shown for name in ("very dark", "camera.png", "transparent"))


def test_pack__then_train_on_it(distill: Run, tmp_path: Path) -> None:
    folder = images(tmp_path / "images")
    result = distill("data", "pack", str(folder), str(tmp_path / "packed"))
    assert result.code == 0 and "6 images in 1 shards" in result.out
    assert distill("check", recipe(tmp_path, tmp_path / "packed")).code == 0
    assert distill("data", "pack", str(folder)).code == 2


def test_show__draws_a_sheet(distill: Run, tmp_path: Path) -> None:
    folder = images(tmp_path / "images")
    sheets = []
    for step in ("0", "1"):
        out = tmp_path / f"{step}.png"
        words = ("data", "show", recipe(tmp_path, folder), "-o", str(out), "--step", step)
        assert distill(*words, "--images", "3", "--stage", "gram").code == 0
        with Image.open(out) as sheet:
            sheets.append(np.asarray(sheet))
    height, width, _ = sheets[0].shape
    assert height == 3 * 166 + 6 and width > 5 * 160
    assert sheets[0].shape == sheets[1].shape and not np.array_equal(*sheets)
    wrong = distill("data", "show", recipe(tmp_path, folder), "--stage", "gramm")
    assert wrong.code == 2 and "--stage gramm: not a stage" in wrong.err


@pytest.mark.slow
def test_bench_loader__compares_with_pillow(distill: Run, tmp_path: Path) -> None:
    words = ("bench", "loader", recipe(tmp_path, images(tmp_path / "images")), "--images", "8")
    synthetic = json.loads(distill(*words, "--json").out)
    assert synthetic["crops"] == "2 x 32 + 2 x 16" and "synthetic" in synthetic["images"]
    assert set(synthetic["cases"]) == {"all crops", "global crops only"}
    own = json.loads(distill(*words, "--data", "recipe", "--json").out)
    assert own["images"] == "the recipe's"
    for case in own["cases"].values():
        for side in ("pillow", "torchvision"):
            ratio = case[f"over_{side}"]
            assert case[side]["min"] > 0 and ratio["min"] <= ratio["median"] <= ratio["max"]
    assert distill(*words, "--data", "mine").code == 2


def test_check__nothing_vanishes(distill: Run, tmp_path: Path) -> None:
    folder = tmp_path / "[/x]"
    folder.mkdir(parents=True)
    images(folder / "cat[b]")
    images(folder / os.fsdecode(b"d\xe9g"))
    (folder / "tif").mkdir()
    (folder / "tif/1.tif").touch()
    (folder / os.fsdecode(b"d\xe9g/broken.jpg")).write_bytes(b"x")
    result = distill("data", "check", str(folder))
    text = re.sub(r"\s+", " ", result.out)
    assert result.code == 1 and "1 with suffix .tif" in text and "[/x]" in text
    assert "no picture that is read in tif" in text and "d\\xe9g/broken.jpg" in text
    (found,) = json.loads(distill("data", "check", str(folder), "--json").out)
    assert found["passed_over"] == {"with suffix .tif": 1} and found["without_label"] == 0
    checked = distill("check", recipe(tmp_path, folder))
    assert (
        checked.code == 0 and "[/x]: 13 images\n    passed over: 1 with suffix .tif" in checked.out
    )
    assert "13 images" in checked.out
    facts = json.loads(distill("check", recipe(tmp_path, folder), "--json").out)
    assert facts["besides"][str(folder)]["lost_classes"] == ["tif (1 with suffix .tif)"]
    packed = distill("data", "pack", str(folder), str(tmp_path / "packed"))
    assert packed.code == 0 and "passed over: 1 with suffix .tif" in packed.out
    (tmp_path / "packed/preview.png").touch()
    refused = distill("data", "show", recipe(tmp_path, tmp_path / "packed"), "-o", "x.png")
    assert refused.code == 1 and "preview.png was added later" in refused.err
