import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.data import build_index as index_module
from distill.data.build_index import build_index
from distill.data.index import ImageIndex, make_index
from distill.data.pack import pack
from distill.data.photographs import NAMES, write_tiles
from distill.errors import DataError
from distill.listing.headers import Decoder
from distill.listing.locations import Location
from distill.listing.sources import Found


def paint(path: Path, size: tuple[int, int] = (24, 16), exif: Image.Exif | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if exif is None:
        image.save(path)
    else:
        image.save(path, exif=exif)
    return path


def test_build_index__classes_are_the_first_folders(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/deep/2.jpg", "dog/1.webp"):
        paint(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    index = build_index([tmp_path], max_bad_fraction=0.0)
    assert index.class_names == ("cat", "dog")
    assert index.labels is not None and index.labels.tolist() == [0, 0, 1]
    assert index.hw.tolist() == [[16, 24]] * 3


def test_build_index__a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cat/1.png", "dog/1.png"):
        paint(tmp_path / "images" / name)
    monkeypatch.chdir(tmp_path)
    index = build_index([Path("images")], max_bad_fraction=0.0)
    assert index.class_names == ("cat", "dog")
    assert all(Path(str(index.location(i))).is_absolute() for i in range(2))


def test_build_index__no_classes_in_a_flat_folder(tmp_path: Path) -> None:
    paint(tmp_path / "1.png")
    paint(tmp_path / "cat" / "2.png")
    assert build_index([tmp_path], max_bad_fraction=0.0).labels is None


def test_build_index__sizes_are_after_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    paint(tmp_path / "turned.jpg", (24, 16), exif)
    assert build_index([tmp_path], max_bad_fraction=0.0).hw.tolist() == [[24, 16]]


def test_build_index__names_a_broken_file_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(3):
        paint(tmp_path / f"{i}.png")
    whole = paint(tmp_path / "half.jpg", (400, 300)).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level(logging.WARNING):
        index = build_index([tmp_path], max_bad_fraction=0.0)
    assert len(index) == 3
    assert [r for r in caplog.records if "half.jpg: left out, cannot be used" in r.getMessage()]


def test_build_index__too_many_broken_files_stop_it(tmp_path: Path) -> None:
    paint(tmp_path / "good.png")
    for i in range(2):
        (tmp_path / f"bad{i}.jpg").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"bad0.jpg: cannot be used \(empty file\); 2 of 3 images are broken"
    ):
        build_index([tmp_path], max_bad_fraction=0.1)


def test_build_index__missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not there"):
        build_index([tmp_path / "nowhere"], max_bad_fraction=0.0)
    with pytest.raises(DataError, match="holds no images"):
        build_index([tmp_path], max_bad_fraction=0.0)


@pytest.mark.parametrize("is_labelled", [True, False])
def test_save__load_gives_the_same_back(is_labelled: bool, tmp_path: Path) -> None:
    locations = [Location.of(Path("/x/ä 1.png")), Location.of(Path("/y/2.png"))]
    found = [
        Found(location, label if is_labelled else "")
        for location, label in zip(locations, "äb", strict=True)
    ]
    index = make_index(found, [(1, 2), (3, 4)], (("x", 1), ("y", 1)))
    for _ in range(2):  # a second time over the first
        index.save(tmp_path / "index")
    loaded = ImageIndex.load(tmp_path / "index")
    assert [loaded.location(i) for i in range(2)] == locations
    assert loaded.class_names == (("b", "ä") if is_labelled else ())
    assert (loaded.labels is None) != is_labelled and loaded.bounds == (range(1), range(1, 2))
    assert loaded.fingerprint == index.fingerprint
    assert isinstance(loaded.hw, np.memmap)


def test_load__what_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a readable index"):
        ImageIndex.load(tmp_path / "nothing")
    index = make_index([Found(Location.of(Path("/x/1.png")), "")], [(1, 2)], (("x", 1),))
    index.save(tmp_path / "index")
    np.save(tmp_path / "index/hw.npy", np.zeros((1, 2)))
    with pytest.raises(DataError, match=r"hw\.npy holds float64, not int32"):
        ImageIndex.load(tmp_path / "index")
    array = np.array([{}], dtype=object)
    np.save(tmp_path / "index/hw.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match="not a readable index"):
        ImageIndex.load(tmp_path / "index")


def test_build_index__numbers_as_classes_are_ordered_as_numbers(tmp_path: Path) -> None:
    for name in ("10/a.png", "9/a.png", "x/a.png"):
        paint(tmp_path / name)
    assert build_index([tmp_path], max_bad_fraction=0.0).class_names == ("9", "10", "x")


def test_subset__keeps_sources_and_places(tmp_path: Path) -> None:
    for name in ("one/1.png", "one/2.png", "two/3.png", "two/4.png"):
        paint(tmp_path / name)
    index = build_index([tmp_path / "one", tmp_path / "two"], max_bad_fraction=0.0)
    assert index.bounds == (range(2), range(2, 4))
    some = index.subset(np.array([1, 2, 3]))
    assert some.bounds == (range(1), range(1, 3))
    assert [Path(str(some.location(i))).name for i in range(3)] == ["2.png", "3.png", "4.png"]


def test_build_index__images_without_a_label_keep_the_labels_of_the_rest(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "loose.png"):
        paint(tmp_path / "images" / name)
    index = build_index([tmp_path / "images"], max_bad_fraction=0.0)
    assert index.labels is not None and index.labels.tolist() == [0, 0, 1, -1]
    assert index.label_counts == {"cat": 2, "dog": 1, "": 1}
    index.save(tmp_path / "index")
    again = ImageIndex.load(tmp_path / "index")
    assert again.label_counts == index.label_counts and again.fingerprint == index.fingerprint


def test_build_index__a_name_that_is_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"images\xe9")
    for name in (b"caf\xe9/1.png", b"caf\xe9/\xff.png", b"dog/1.png"):
        paint(folder / os.fsdecode(name))
    index = build_index([folder], max_bad_fraction=0.0)
    index.save(tmp_path / "index")
    again = ImageIndex.load(tmp_path / "index")
    for image in range(3):
        assert again.location(image) == index.location(image)
        assert Path(str(again.location(image))).is_file()
    assert again.class_names == (os.fsdecode(b"caf\xe9"), "dog")
    assert again.sources == index.sources


def test_build_index__keeps_what_was_passed_over(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.png", "broken/1.png"):
        paint(tmp_path / "images" / name)
    (tmp_path / "images/broken/1.png").write_bytes(b"not an image")
    (tmp_path / "images/cat/a.tif").touch()
    build_index([tmp_path / "images"], max_bad_fraction=0.0).save(tmp_path / "index")
    passed = ImageIndex.load(tmp_path / "index").passed_over
    assert passed.reasons == {"with suffix .tif": 1, "broken": 1}
    assert passed.lost_classes == ["broken (all broken)"]


def test_load__an_index_of_before(tmp_path: Path) -> None:
    paint(tmp_path / "images/1.png")
    build_index([tmp_path / "images"], max_bad_fraction=0.0).save(tmp_path / "index")
    path = tmp_path / "index/index.json"
    facts = json.loads(path.read_text())
    for key in ("passed_over", "lost_classes", "remarks"):
        del facts[key]
    path.write_text(json.dumps(facts))
    index = ImageIndex.load(tmp_path / "index")
    assert len(index) == 1 and index.held_out is None and not index.passed_over.all_lines()


def test_write_tiles__about_1500_in_a_checkerboard_written_once(tmp_path: Path) -> None:
    train, held_out = write_tiles(tmp_path / "tiles")
    names = [{str(p.relative_to(part)) for p in part.rglob("*.png")} for part in (train, held_out)]
    assert len(names[0]) == 766 and len(names[1]) == 764 and not names[0] & names[1]
    assert {Path(name).parts[0] for name in names[0]} == set(NAMES)
    row, column = 3, 4
    assert f"astronaut/r{row:02}c{column:02}.png" in names[1]
    with Image.open(train / "retina" / "r00c00.png") as tile:
        assert (tile.size, tile.mode) == ((64, 64), "RGB")
    before = (train / "retina" / "r00c00.png").stat().st_mtime_ns
    write_tiles(tmp_path / "tiles")
    assert (train / "retina" / "r00c00.png").stat().st_mtime_ns == before


def odd_and_plain(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    Image.new("RGBA", (20, 10)).save(folder / "clear.png")
    Image.new("RGB", (20, 10)).save(folder / "plain.png")


def test_build_index__says_who_draws_each_image(tmp_path: Path) -> None:
    odd_and_plain(tmp_path / "images")
    index = build_index([tmp_path / "images"], max_bad_fraction=0.0)
    index.save(tmp_path / "index")
    for each in (index, ImageIndex.load(tmp_path / "index")):
        assert [each.decoder(image) for image in range(2)] == [Decoder.PILLOW, Decoder.DALI]
    assert index.subset(np.array([1])).decoder(0) is Decoder.DALI


def test_load__an_index_of_before_leaves_it_undecided(tmp_path: Path) -> None:
    odd_and_plain(tmp_path / "images")
    build_index([tmp_path / "images"], max_bad_fraction=0.0).save(tmp_path / "index")
    (tmp_path / "index" / "decoders.npy").unlink()
    index = ImageIndex.load(tmp_path / "index")
    assert index.decoder(0) is index.subset(np.array([1])).decoder(0) is Decoder.UNDECIDED


@pytest.mark.parametrize("is_old", [False, True])
def test_build_index__packed_sources_bring_it_or_are_looked_at_again(
    is_old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd_and_plain(tmp_path / "images")
    settings: Any = {"images_per_shard": 10, "max_megapixels": 1.0, "progress": lambda *_: None}
    pack([tmp_path / "images"], tmp_path / "packed", **settings)
    read: list[str] = []
    plain = index_module.measure
    monkeypatch.setattr(index_module, "measure", lambda *a: (read.append("x"), plain(*a))[1])
    if is_old:  # packed by version 0.1.0
        (tmp_path / "packed" / "index" / "decoders.npy").unlink()
    index = build_index([tmp_path / "packed"], max_bad_fraction=0.0)
    assert [index.decoder(image) for image in range(2)] == [Decoder.PILLOW, Decoder.DALI]
    assert len(read) == (2 if is_old else 0)
