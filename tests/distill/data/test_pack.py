import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from distill.data import pack as packing
from distill.data.build_index import build_index
from distill.data.dataset_report import take_report
from distill.data.pack import pack
from distill.errors import DataError
from distill.listing.locations import Reader
from distill.listing.sources import INDEX_FOLDER
from tests.support.pictures import picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(7):
        path = tmp_path / "images" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number)).save(path)
    (tmp_path / "images/cat/broken.jpg").write_bytes(b"nonsense")
    return tmp_path / "images"


def run(folder: Path, out: Path) -> dict[str, int]:
    told: list[tuple[int, int]] = []
    counts = pack(
        [folder],
        out,
        images_per_shard=3,
        max_megapixels=64.0,
        progress=lambda *numbers: told.append(numbers),
    )
    assert told[-1] == (8, 8)
    return counts


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("shard-*.tar")}


def test_pack__holds_every_image_and_is_found_where_it_is_moved(
    folder: Path, tmp_path: Path
) -> None:
    assert run(folder, tmp_path / "packed") == {"images": 7, "left_out": 1, "shards": 3}
    (left,) = (tmp_path / "packed").glob("*.left_out.jsonl")
    assert json.loads(left.read_text())["reason"] == "not an image"
    (tmp_path / "packed").rename(tmp_path / "moved")
    for path in folder.rglob("*"):
        path.unlink() if path.is_file() else None
    index = build_index([tmp_path / "moved"], max_bad_fraction=0.0)
    assert index.class_names == ("cat", "dog") and index.labels is not None
    assert index.labels.tolist() == [0, 0, 0, 1, 1, 1, 1] and set(map(tuple, index.hw)) == {
        (48, 64)
    }
    data = [Reader().read(index.location(image)).tobytes() for image in range(7)]
    assert len(set(data)) == 7 and all(each.startswith(b"\x89PNG") for each in data)
    with tarfile.open(tmp_path / "moved/shard-000000.tar") as shard:
        names = [f"{number:09}.{kind}" for number in range(3) for kind in ("png", "cls")]
        assert shard.getnames() == names


def test_pack__goes_on_after_a_stop_with_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, tmp_path / "once")
    write = packing._write_shard

    def dies_in_the_second(path: Path, *rest: object) -> None:
        if path.name == "shard-000001.tar":
            path.with_name(f".{path.name}.part").write_bytes(b"half")
            raise KeyboardInterrupt
        write(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "_write_shard", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "twice")
    first = (tmp_path / "twice/shard-000000.tar").stat().st_mtime_ns
    monkeypatch.undo()
    run(folder, tmp_path / "twice")
    assert (tmp_path / "twice/shard-000000.tar").stat().st_mtime_ns == first
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")
    assert not list((tmp_path / "twice").glob(".*"))


def test_pack__refuses_a_folder_that_holds_something_else(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds other files"):
        run(folder, folder)
    run(folder, tmp_path / "packed")
    (folder / "dog/8.png").write_bytes((folder / "dog/0.png").read_bytes())
    with pytest.raises(DataError, match=r"was packed from something else \(images, names differ\)"):
        run(folder, tmp_path / "packed")


def test_build_index__a_packed_source_beside_a_folder(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "packed")
    (tmp_path / "more").mkdir()
    Image.fromarray(picture(9)).save(tmp_path / "more/a.png")
    index = build_index([tmp_path / "packed", tmp_path / "more"], max_bad_fraction=0.0)
    assert index.bounds == (range(7), range(7, 8)) and index.label_counts[""] == 1
    assert (tmp_path / "packed" / INDEX_FOLDER).is_dir()


def test_take_report__counts_everything(folder: Path) -> None:
    Image.fromarray(picture(0)).save(folder / "dog" / "again.png")
    (dataset,) = take_report([folder], max_megapixels=64.0, progress=lambda *_: None)
    assert (dataset.images, dataset.classes, dataset.duplicates) == (9, 2, 1)
    assert dataset.formats == {"PNG": 8} and dataset.shorter_side["median"] == 48
    assert [(Path(f.sample).name, f.reason) for f in dataset.broken] == [
        ("broken.jpg", "not an image")
    ]
