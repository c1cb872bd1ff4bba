"""Whatever lies in a folder, a shard, a list or a table is an image, a refusal or a count."""

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from distill.errors import DataError
from distill.listing.locations import image_field
from distill.listing.passed_over import PassedOver
from distill.listing.sources import Found, find_problem, list_source


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def shard(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def table(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    made = pyarrow.table(dict(columns))
    pyarrow.parquet.write_table(made.replace_schema_metadata(options), path)
    return path


def labels(found: list[Found]) -> dict[str, str]:
    return {each.location.name: each.label for each in found}


def survey(source: Path, **options: Any) -> tuple[list[str], PassedOver]:
    passed = PassedOver()
    found = list_source(source, passed_over=passed, **options)
    return [each.location.name for each in found], passed


SYSTEM = [
    "._1.jpg",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    "__MACOSX/1.jpg",
    "@eaDir/1.jpg",
    "cat/.thumbnails/1.jpg",
    ".ipynb_checkpoints/1.jpg",
    ".Trash-1000/files/1.jpg",
    "lost+found/1.jpg",
    "#recycle/1.jpg",
    "$RECYCLE.BIN/1.jpg",
]


def test_list_source__what_systems_leave_is_counted_in_folders_and_shards(tmp_path: Path) -> None:
    others = ("notes", "x.tif", "y.TIF", "cat/.hidden.jpg", ".git/1.jpg")
    names = ("cat/1.jpg", "cat/2.jpe", "dog/1.jfif", "dog/2.dib")
    folder = touch(tmp_path / "images", *SYSTEM, *others, *names)
    members = dict.fromkeys((*SYSTEM, *others, *names), b"x")
    listed, packed = survey(folder), survey(shard(tmp_path / "x.tar", members))
    assert listed[0] == packed[0] == list(names)
    assert listed[1].reasons == packed[1].reasons
    assert listed[1].reasons["with suffix .tif"] == 2 and listed[1].reasons["hidden"] == 2
    assert listed[1].reasons["in system folder .Trash*"] == listed[1].reasons["without suffix"] == 1
    assert listed[1].reasons.total() == len(SYSTEM) + len(others) and not listed[1].lost_classes


def test_list_source__a_class_that_loses_all_its_pictures_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = touch(tmp_path, "cat/1.jpg", "dog/1.tif", "dog/deep/2.gif", "closed/1.jpg")
    (folder / "empty").mkdir()
    (folder / "closed").chmod(0o000)  # root of this machine may enter all the same
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    names, passed = survey(folder)
    assert names == ["cat/1.jpg"] and passed.reasons["unreadable folder (Permission denied)"] == 1
    assert passed.lines() == [
        "no picture that is read in closed (1 unreadable folder (Permission denied)), "
        "dog (1 with suffix .gif, 1 with suffix .tif), empty (empty)"
    ]


@pytest.mark.parametrize("link", ["aaa", "zzz"])
@pytest.mark.parametrize("order", [1, -1])
def test_list_source__a_link_to_a_class_never_replaces_it(
    link: str, order: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = touch(tmp_path / "images", "cat/1.jpg", "dog/1.jpg")
    outside = touch(tmp_path / "outside", "1.jpg")
    for name, target in ((link, "cat"), ("more", outside), ("twice", outside)):
        (folder / name).symlink_to(target)
    (folder / "dog/2.jpg").symlink_to("nowhere")
    scandir = os.scandir

    class Sorted:
        def __init__(self, path: str) -> None:
            self._found = sorted(scandir(path), key=lambda entry: entry.name)[::order]

        def __enter__(self) -> list[Any]:
            return self._found

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("os.scandir", Sorted)
    names, passed = survey(folder)
    assert names == ["cat/1.jpg", "dog/1.jpg", "more/1.jpg"]
    assert passed.reasons == {"link to a folder that is read already": 2, "broken link": 1}
    assert [text.split()[0] for text in passed.lost_classes] == sorted([link, "twice"])


def test_list_source__images_beside_shards_are_refused_with_what_to_write(tmp_path: Path) -> None:
    touch(tmp_path / "box", "preview.png", "cat/1.JPG")
    shard(tmp_path / "box/x.tar", {"1.jpg": b"x"})
    with pytest.raises(DataError, match=r"both images \(2, such as .*and shards") as caught:
        list_source(tmp_path / "box")
    assert "{JPG,png}" in caught.value.fix and "/**/*.tar" in caught.value.fix
    with pytest.raises(DataError, match="both images"):
        list_source(tmp_path / "box/*.*")
    assert survey(tmp_path / "box/**/*.tar")[0] == ["1.jpg"]
    assert survey(tmp_path / "box/**/*.{JPG,png}")[0] == ["cat/1.JPG", "preview.png"]


def test_list_source__patterns_of_images_have_the_folders_as_classes(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "dog/1.jpg", "loose.jpg", "dog/1.txt")
    for text in ("*/*.jpg", "{cat,dog}/*.jpg", "{cat,dog}/1.jpg", "*/*.{jpg,txt}"):
        if "txt" in text:
            touch(tmp_path, "dog/x.md")
        found = list_source(tmp_path / text)
        assert {"cat", "dog"} <= {each.label for each in found}, text
    assert [each.label for each in list_source(tmp_path / "*.jpg")] == [""]
    assert [each.label for each in list_source(tmp_path / "cat/1.jpg")] == [""]
    names, passed = survey(tmp_path / "dog/*.{jpg,md}")
    assert names == ["1.jpg"] and passed.reasons == {"with suffix .md": 1}


def test_list_source__lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "a #1.jpg", "i0.jpg")
    name = os.fsencode("caf") + b"\xe9.jpg"
    lines = b"i0.jpg # first\r\n  ~/i1.jpg \t\r\n\r\n# note\r\n$HOME/i2.jpg\r\n"
    lines += b"a #1.jpg\r\nsub/i3.jpg\t#x\r\n._i0.jpg\r\n" + name
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + lines)
    names, passed = survey(tmp_path / "list.txt")
    home = str(tmp_path)
    assert names == [
        *("i0.jpg", f"{home}/i1.jpg", f"{home}/i2.jpg", "a #1.jpg", "sub/i3.jpg"),
        os.fsdecode(name),
    ]
    assert passed.reasons == {"system file ._*": 1}
    (tmp_path / "list.txt").write_text("i0.jpg\ni1.jpg\n", encoding="utf-16")
    assert survey(tmp_path / "list.txt")[0] == ["i0.jpg", "i1.jpg"]


def test_list_source__train_and_val_are_no_classes(tmp_path: Path) -> None:
    names = ("train/cat/1.jpg", "train/dog/1.jpg", "Val/cat/2.jpg", "test/3.jpg")
    folder = touch(tmp_path / "images", *names)
    for source in (folder, shard(tmp_path / "x.tar", dict.fromkeys(names, b"x"))):
        found = list_source(source)
        assert sorted((each.label, each.is_held_out) for each in found) == [
            ("", True),
            ("cat", False),
            ("cat", True),
            ("dog", False),
        ]
    told = survey(folder)[1].remarks
    assert len(told) == 1 and "2 of 4 images lie in val or test" in told[0]
    by_key = list_source(folder, label_depth=1)
    assert {each.label for each in by_key} == {"train", "Val", "test"}
    assert not any(each.is_held_out for each in by_key)
    assert {each.label for each in list_source(folder, label_depth=0)} == {""}
    touch(folder, "bus/1.jpg")  # then train is a class of vehicles
    assert {each.label for each in list_source(folder)} == {"train", "Val", "test", "bus"}


def test_list_source__shards_and_tables_that_are_held_out_by_name(tmp_path: Path) -> None:
    for name in ("train-000.tar", "validation-000.tar"):
        shard(tmp_path / name, {"1.jpg": b"x", "1.cls": b"3"})
    assert [each.is_held_out for each in list_source(tmp_path)] == [False, True]
    assert [each.is_held_out for each in list_source(tmp_path / "validation-000.tar")] == [False]
    shard(tmp_path / "extra.tar", {"1.jpg": b"x"})
    assert not any(each.is_held_out for each in list_source(tmp_path))


def test_list_source__dotted_names_of_members(tmp_path: Path) -> None:
    members = {f"a/img.v1.{i}.{end}": b"%d" % i for i in range(3) for end in ("jpg", "cls")}
    members |= {
        "b.jpg": b"x",
        "b.mask.png": b"x",
        "b.cls": b"9",
        "./c.PNG.jpg": b"x",
        "c.cls": b"8",
    }
    found = labels(list_source(shard(tmp_path / "x.tar", members)))
    assert list(found.values()) == ["0", "1", "2", "9", "9", "8"]
    with tarfile.open(tmp_path / "two.tar", "w") as file:
        for name, data in (("a.jpg", b"x"), ("a.cls", b"1"), ("a.cls", b"2")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    with pytest.raises(DataError, match=r"a has two labels, '1' \(a.cls\) and '2' \(a.cls\)"):
        list_source(tmp_path / "two.tar")


def test_list_source__odd_labels_of_members(tmp_path: Path) -> None:
    texts = {
        "a": b" cat\n",
        "b": b"x" * 78,
        "c": b"x" * 5000,
        "d": b"\x00\x01",
        "e": b"",
        "f": b"k\xe4",
    }
    members = {f"s/{key}.jpg": b"x" for key in (*texts, "none")}
    members |= {f"s/{key}.cls": text for key, text in texts.items()}
    passed = PassedOver()
    found = labels(list_source(shard(tmp_path / "x.tar", members), passed_over=passed))
    assert list(found.values()) == ["cat", "x" * 78, "", "", "", "k\udce4", ""]  # not "s"
    assert len(passed.remarks) == 3 and "s/c.cls holds no name of a class" in passed.remarks[0]


IMAGE = pyarrow.array([b"x", b"x", b"x"])


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([None, 1, 0], ["", "1", "0"]),
        ([1.0, float("nan"), None], ["1", "", ""]),
        (["cat", None, " dog "], ["cat", "", "dog"]),
        ([True, False, None], ["True", "False", ""]),
        ([None, None, None], ["", "", ""]),
        (pyarrow.array(["a", "b", None]).dictionary_encode(), ["a", "b", ""]),
        ([-1, 0, 1], ["-1", "0", "1"]),
        ([b"png", b"png", b"png"], None),
        ([{"bytes": b"png", "path": ""}] * 3, None),
        ([[1], [2], [3]], None),
    ],
)
def test_list_source__labels_of_tables(
    column: Any, expected: list[str] | None, tmp_path: Path
) -> None:
    passed = PassedOver()
    path = table(tmp_path / "x.parquet", {"label": column, "image": IMAGE})
    found = list_source(path, passed_over=passed)
    assert [each.label for each in found] == (expected or ["", "", ""])
    told = [line for line in passed.remarks if "no labels" in line]
    assert len(told) == (expected is None) and all(len(line) < 200 for line in told)


def test_list_source__minus_one_of_a_class_label_is_none(tmp_path: Path) -> None:
    path = table(
        tmp_path / "x.parquet",
        {"label": [-1, 0, 1], "image": IMAGE},
        huggingface='{"info": {"features": {"label": {"_type": "ClassLabel"}}}}',
    )
    assert [each.label for each in list_source(path)] == ["", "0", "1"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["mask", "image"], "image"),
        (["thumb", "JPG"], "JPG"),
        (["img", "jpg"], "jpg"),
        (["photo", "label"], "photo"),
        (["photo"], "photo"),
        (["front", "back"], None),
    ],
)
def test_image_field__the_name_decides(names: list[str], chosen: str | None) -> None:
    schema = pyarrow.schema([(name, pyarrow.binary()) for name in names])
    if chosen is None:
        with pytest.raises(OSError, match="front, back"):
            image_field(schema)
    else:
        assert image_field(schema) == (chosen, "")


def test_find_problem__says_what_is_wrong_with_a_path(tmp_path: Path) -> None:
    touch(tmp_path, "cat/1.jpg", "x.zip", "empty/x.md")
    for text in ("cat", "cat/*.jpg", "{cat,empty}", "cat/1.jpg"):
        assert not find_problem(f"{tmp_path}/{text}", has_lister=False), text
    for text, told in (
        ("none", "none' is not there or no source"),
        ("x.zip", "x.zip' is not there or no source"),
        ("empty", "empty' holds no image (bmp,"),
        ("*.png", "*.png' matches nothing"),
        ("{000..001}.tar", "000.tar (of "),
    ):
        assert told in find_problem(f"{tmp_path}/{text}", has_lister=False)
    assert not find_problem(f"{tmp_path}/x.zip", has_lister=True)
