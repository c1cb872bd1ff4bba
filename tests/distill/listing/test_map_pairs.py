import json
from pathlib import Path

import pytest

from distill.errors import DataError
from distill.listing.map_pairs import MapFolder, list_map_pairs, list_point_pairs


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names_of(folder: MapFolder, source: Path) -> list[tuple[str, str, bool]]:
    return [
        (
            str(Path(str(pair.picture)).relative_to(source)),
            pair.map.name,
            pair.is_held_out,
        )
        for pair in folder.pairs
    ]


def test_list_map_pairs__as_ade20k_label_0_is_ignored_and_validation_held_out(
    tmp_path: Path,
) -> None:
    write(tmp_path, "images/training/a.jpg", "annotations/training/a.png")
    write(tmp_path, "images/validation/b.jpg", "annotations/validation/b.png")
    write(tmp_path, "images/training/c.jpg")
    found = list_map_pairs(tmp_path, "mask")
    assert names_of(found, tmp_path) == [
        ("images/training/a.jpg", "annotations/training/a.png", False),
        ("images/validation/b.jpg", "annotations/validation/b.png", True),
    ]
    assert found.ignored == {0, 255} and found.num_without == 1
    assert found.pictures == tmp_path / "images"


def test_list_map_pairs__as_voc_by_its_lists(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path, f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("b\nmissing\n")
    found = list_map_pairs(tmp_path, "mask")
    assert [pair.is_held_out for pair in found.pairs] == [False, True, False]
    assert found.ignored == {255}


def test_list_map_pairs__beside_each_other_a_fifth_is_held_out_by_name(tmp_path: Path) -> None:
    for index in range(10):
        write(tmp_path, f"{index}.jpg", f"{index}.png")
    found = list_map_pairs(tmp_path, "mask")
    assert len(found.pairs) == 10 and sum(pair.is_held_out for pair in found.pairs) == 2
    held_out = {pair.picture.name for pair in found.pairs if pair.is_held_out}
    write(tmp_path, "99.jpg")  # a picture without a map changes nothing
    again = list_map_pairs(tmp_path, "mask")
    assert {pair.picture.name for pair in again.pairs if pair.is_held_out} == held_out
    assert str(tmp_path / "3.png") in found.maps and len(found.maps) == 10


@pytest.mark.parametrize(
    ("picture", "depth"),
    [
        ("a.jpg", "a.npy"),
        ("a.png", "a.npy"),
        ("a.jpg", "a.png"),
        ("a.png", "a_depth.png"),
        ("kitchen/rgb_00045.jpg", "kitchen/sync_depth_00045.png"),
        ("rgb/x/a.png", "depth/x/a.png"),
        ("images/a.jpg", "depth/a.npy"),
    ],
)
def test_list_map_pairs__depth(tmp_path: Path, picture: str, depth: str) -> None:
    write(tmp_path, picture, depth)
    found = list_map_pairs(tmp_path, "depth")
    assert [name[:2] for name in names_of(found, tmp_path)] == [(picture, depth)]
    assert found.metres == 0.001


def test_list_map_pairs__what_the_folder_states_counts(tmp_path: Path) -> None:
    write(tmp_path, "images/a.jpg", "annotations/a.png")
    (tmp_path / "dense.json").write_text('{"ignore": [7], "metres": 0.0002}')
    found = list_map_pairs(tmp_path, "mask")
    assert found.ignored == {7} and found.metres == 0.0002


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"ignor": [1]}', '{"metres": 0}', '{"ignore": ["a"]}']
)
def test_list_map_pairs__a_statement_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    write(tmp_path, "a.jpg", "a.png")
    (tmp_path / "dense.json").write_text(text)
    with pytest.raises(DataError, match=r"dense\.json: not as"):
        list_map_pairs(tmp_path, "mask")


def test_list_map_pairs__no_maps_and_no_folder(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "b.png")
    with pytest.raises(DataError, match=r"no picture has a mask map \(\.png\)"):
        list_map_pairs(tmp_path, "mask")
    with pytest.raises(DataError, match="not a folder"):
        list_map_pairs(tmp_path / "a.jpg", "depth")


def test_list_point_pairs__bad_lines_are_named_and_the_others_stay(tmp_path: Path) -> None:
    good = {"a": "x.jpg", "b": "y/z.jpg", "points": [[1, 2, 3, 4]], "box": [0, 0, 5, 6]}
    lines = [
        json.dumps(good),
        "",
        "no JSON",
        json.dumps({**good, "points": []}),
        json.dumps({**good, "points": [[1, 2, 3]]}),
        json.dumps({**good, "box": [5, 0, 5, 6]}),
        json.dumps({"a": "x.jpg", "points": [[1, 2, 3, 4]]}),
        "[]",
        json.dumps({**good, "box": None}),
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    found, bad = list_point_pairs(tmp_path)
    assert [str(each) for each in found[0].pictures] == [
        f"{tmp_path}/x.jpg",
        f"{tmp_path}/y/z.jpg",
    ]
    assert found[0].points == ((1.0, 2.0, 3.0, 4.0),) and found[0].box == (0.0, 0.0, 5.0, 6.0)
    assert found[1].box is None and len(found) == 2
    assert [name.rpartition(":")[2] for name, _ in bad] == ["3", "4", "5", "6", "7", "8"]


def test_list_point_pairs__no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl: missing"):
        list_point_pairs(tmp_path)
