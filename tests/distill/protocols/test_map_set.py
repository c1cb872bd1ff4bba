from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data.locations import Reader
from distill.listing.decode import decode_rgb
from distill.listing.held import Held
from distill.listing.map_pairs import MapKind
from distill.protocols import map_set
from distill.protocols.map_set import IGNORED, MapSet, list_maps, open_maps
from distill.protocols.score import CannotScoreError

SIZE = (12, 8)  # width and height


def write(folder: Path, count: int = 5, kind: str = "masks") -> Path:
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for index in range(count):
            picture = folder / "images" / part / f"{index}.png"
            other = folder / kind / part / f"{index}.png"
            for path in (picture, other):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 255, (*SIZE[::-1], 3), dtype=np.uint8)).save(picture)
            values = random.choice(np.array([0, 7, 40, 255], np.uint8), SIZE[::-1])
            if kind == "depth":
                values = values.astype(np.uint16) * 20
            Image.fromarray(values).save(other)
    return folder


def opened(folder: Path, kind: MapKind = "mask") -> MapSet:
    listed = list_maps(folder, kind, "quick")
    reader = Reader()
    pictures = Held(lambda at: decode_rgb(reader.read(at), None), [], 0)
    return open_maps(listed, kind, pictures)


def test_open_maps__labels_are_counted_through_and_what_is_ignored_is_no_class(
    tmp_path: Path,
) -> None:
    maps = opened(write(tmp_path))
    assert maps.labels == (0, 7, 40) and not maps.left_out
    assert (len(maps.train), len(maps.test)) == (5, 5)
    with Image.open(str(maps.test[0].map)) as image:
        stored = np.asarray(image)
    right = np.select([stored == 0, stored == 7, stored == 40], [0, 1, 2], IGNORED)
    assert maps.values(maps.test[0].map).tolist() == right.tolist()
    assert maps.settings["maps"] == "as stored, 12 x 8 px"
    assert maps.settings["ignored"] == "255" and maps.settings["classes"] == 3


def test_open_maps__what_cannot_be_used_is_left_out_with_a_reason(tmp_path: Path) -> None:
    masks = write(tmp_path) / "masks" / "train"
    with Image.open(masks / "0.png") as mask:
        mask.resize((6, 4), Image.Resampling.NEAREST).save(masks / "0.png")
    (masks / "1.png").write_bytes(b"torn")
    Image.new("RGB", SIZE).save(masks / "2.png")
    Image.new("L", SIZE, 255).save(masks / "3.png")
    (tmp_path / "images" / "val" / "4.png").write_bytes(b"")
    maps = opened(tmp_path)
    assert (len(maps.train), len(maps.test)) == (1, 4)
    reasons = {
        Path(each.sample).parent.name + Path(each.sample).stem: each.reason
        for each in maps.left_out
    }
    assert reasons["train0"] == "is 6 x 4 px, its picture 12 x 8 px; maps are never resized"
    assert "not an image" in reasons["train1"] and "colours (RGB)" in reasons["train2"]
    assert reasons["train3"] == "no pixel of it counts"
    assert reasons.keys() == {"train0", "train1", "train2", "train3", "val4"}


def test_open_maps__masks_of_one_class(tmp_path: Path) -> None:
    for path in write(tmp_path).glob("masks/*/*.png"):
        Image.new("L", SIZE, 3).save(path)
    with pytest.raises(CannotScoreError, match="the masks name 1 class, two are the least"):
        opened(tmp_path)


def test_open_maps__nothing_is_left(tmp_path: Path) -> None:
    for path in write(tmp_path).glob("masks/val/*.png"):
        path.write_bytes(b"torn")
    with pytest.raises(CannotScoreError, match="5 pictures to learn from and 0 held out"):
        opened(tmp_path)


def test_open_maps__depth_beyond_what_is_scored(tmp_path: Path) -> None:
    maps = opened(write(tmp_path, kind="depth"), "depth")
    assert maps.values(maps.train[0].map).dtype == np.float32 and maps.labels == (0,)
    (tmp_path / "dense.json").write_text('{"metres": 100}')
    with pytest.raises(CannotScoreError, match="10 were left out"):
        opened(tmp_path, "depth")


def test_list_maps__at_most_so_many_evenly_spaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(map_set.MOST, "quick", (3, 2))
    pairs = list_maps(write(tmp_path), "mask", "quick").pairs
    assert [pair.picture.name for pair in pairs] == [
        "train/0.png",
        "train/2.png",
        "train/4.png",
        "val/0.png",
        "val/4.png",
    ]
    assert len(list_maps(tmp_path, "mask", "dinov3").pairs) == 10


def test_list_maps__without_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_set, "find_spec", lambda _: None)
    with pytest.raises(CannotScoreError, match=r'pip install "distill-family\[dense\]"'):
        list_maps(write(tmp_path), "mask", "quick")
