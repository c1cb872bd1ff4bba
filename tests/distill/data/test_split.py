"""What is trained on and what is held out: by class, by folders, not at all."""

from pathlib import Path

import pytest
from PIL import Image

from distill.data.build_index import build_index
from distill.data.index import ImageIndex
from distill.data.pack import pack
from distill.data.split import split, why_nothing_is_held_out
from tests.support.pictures import picture


def index_of(folder: Path, *names: str) -> ImageIndex:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(folder / name)
    return build_index([folder], max_bad_fraction=0.0)


def names_of(index: ImageIndex | None) -> list[str]:
    return [] if index is None else [index.location(i).name for i in range(len(index))]


def test_split__holds_out_a_part_of_every_class(tmp_path: Path) -> None:
    index = index_of(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)))
    train, held_out = split(index, 0.2)
    assert held_out is not None and (len(train), len(held_out)) == (16, 4)
    assert held_out.labels is not None and sorted(held_out.labels.tolist()) == [0, 0, 1, 1]
    assert not set(names_of(train)) & set(names_of(held_out))


def test_split__a_class_of_one_is_trained_on_and_images_without_a_label_too(tmp_path: Path) -> None:
    index = index_of(tmp_path, "cat/1.png", "cat/2.png", "dog/1.png", "loose.png")
    train, held_out = split(index, 0.2)
    assert {"dog/1.png", "loose.png"} < set(names_of(train)) and len(names_of(held_out)) == 1


def test_split__nothing(tmp_path: Path) -> None:
    index = index_of(tmp_path / "a", "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
    assert split(index, 0.0) == (index, None)
    assert "data.held_out is 0" in why_nothing_is_held_out(index, 0.0)
    single = index_of(tmp_path / "b", "cat/1.png", "dog/1.png")
    assert split(single, 0.2) == (single, None)
    assert "every class has one image" in why_nothing_is_held_out(single, 0.2)
    one = index_of(tmp_path / "c", "cat/1.png", "cat/2.png")
    assert split(one, 0.2) == (one, None)
    assert "one class (cat)" in why_nothing_is_held_out(one, 0.2)
    flat = index_of(tmp_path / "d", "1.png")
    assert "no labels" in why_nothing_is_held_out(flat, 0.2)


def test_split__folders_hold_out_before_and_after_packing(tmp_path: Path) -> None:
    parts = ("train/cat", "train/dog", "val/cat", "val/dog")
    folder = tmp_path / "images"
    index = index_of(folder, *(f"{part}/{i}.png" for part in parts for i in range(3)))
    pack(
        [folder],
        tmp_path / "packed",
        images_per_shard=5,
        max_megapixels=64.0,
        progress=lambda _, __: None,
    )
    for each in (index, build_index([tmp_path / "packed"], max_bad_fraction=0.0)):
        train, held_out = split(each, 0.2)
        assert each.class_names == ("cat", "dog") and held_out is not None
        assert train.labels is not None and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert held_out.labels is not None and held_out.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert all(name.startswith("val/") for name in names_of(held_out))
        assert split(each, 0.0) == (each, None)


def test_split__sources_with_and_without_a_split(tmp_path: Path) -> None:
    index_of(tmp_path / "a", "train/cat/1.png", "train/dog/1.png", "test/cat/1.png")
    index_of(tmp_path / "b", *(f"cat/{i}.png" for i in range(5)))
    index = build_index([tmp_path / "a", tmp_path / "b"], max_bad_fraction=0.0)
    train, held_out = split(index, 0.2)
    assert held_out is not None and names_of(held_out)[0] == "test/cat/1.png"
    assert [len(bound) for bound in held_out.bounds] == [1, 1] and len(train) == 6


@pytest.mark.parametrize(
    "names", [("val/cat/1.png", "val/dog/1.png"), ("train/1.png", "bus/1.png")]
)
def test_split__no_split_where_nothing_would_be_trained_on_or_train_is_a_class(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    index = index_of(tmp_path, *names)
    assert index.held_out is None and len(index.class_names) == 2
