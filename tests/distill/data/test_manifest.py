"""A choice as a Parquet file that is a source: images where they lie, with labels and weights."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.curation.chosen import write_chosen
from distill.data.build_index import build_index
from distill.data.file_sizes import file_bytes
from distill.data.index import ImageIndex
from distill.data.manifest import read_manifest
from distill.errors import DataError
from tests.support.command import Run
from tests.support.pictures import picture


@pytest.fixture
def chosen(tmp_path: Path) -> tuple[Path, ImageIndex]:
    """Of six pictures in two classes, some in val, one is chosen twice and one was dropped; with the index of all."""
    for number in range(6):
        folder = tmp_path / "in" / ("val" if number == 5 else "train") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(number, 16, 20)).save(folder / f"{number}.png")
    index = build_index([tmp_path / "in"], max_bad_fraction=0.0)
    index = ImageIndex(**{**vars(index), "file_bytes": file_bytes(index)})
    dropped = [{"row": 1, "reason": "exact", "duplicate_of": 0, "similarity": 1.0}]
    facts = {"by": "dedup", "dropped": {"exact": 1}}
    times = np.array([1, 0, 2, 0, 0, 1])
    write_chosen(tmp_path / "out", index, times, facts, {}, dropped)
    return tmp_path / "out", index


def test_manifest__is_read_as_the_folder_of_the_choice_is(
    chosen: tuple[Path, ImageIndex], tmp_path: Path, distill: Run
) -> None:
    import pyarrow.parquet

    folder, index = chosen
    path = tmp_path / "out.parquet"
    assert distill("data", "manifest", folder, "-o", path).code == 0
    first = path.read_bytes()
    found, same = (build_index([source], max_bad_fraction=0.0) for source in (path, folder))
    assert len(found) == 4 and found.label_counts == same.label_counts
    for row in range(4):
        assert found.location(row) == same.location(row) and found.decoder(row) == same.decoder(row)
    assert (found.hw == same.hw).all() and found.held_out is not None and same.held_out is not None
    assert found.held_out.tolist() == same.held_out.tolist() and found.held_out.sum() == 1
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert [each["weight"] for each in rows] == [1, 0, 2, 0, 0, 1]
    assert (rows[1]["reason"], rows[1]["duplicate_of"], rows[1]["similarity"]) == ("exact", 0, 1.0)
    assert rows[0]["source"] + "/" + rows[0]["member"] == str(index.location(0))
    assert distill("data", "check", path).code == 0
    assert distill("data", "manifest", folder, "-o", path).code == 0 and path.read_bytes() == first


def test_manifest__a_changed_source_and_another_format_are_refused(
    chosen: tuple[Path, ImageIndex], tmp_path: Path, distill: Run
) -> None:
    import pyarrow.parquet

    folder, index = chosen
    path = tmp_path / "out.parquet"
    inside = distill("data", "manifest", folder, "-o", folder / "m.parquet")
    assert inside.code == 1 and "not a .parquet file beside" in inside.err
    assert distill("data", "manifest", folder, "-o", path).code == 0
    with Path(str(index.location(0))).open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"out.parquet: .* bytes, it had"):
        build_index([path], max_bad_fraction=0.0)
    table = pyarrow.parquet.read_table(path)
    other = table.replace_schema_metadata({b"distill.manifest": b"9"})
    pyarrow.parquet.write_table(other, path)
    with pytest.raises(DataError, match="format 9, this version reads 1"):
        read_manifest(path)
    pyarrow.parquet.write_table(table.slice(1, 1), path)
    with pytest.raises(DataError, match="keeps no image"):
        read_manifest(path)
    pyarrow.parquet.write_table(table.replace_schema_metadata({}), path)
    assert read_manifest(path) is None  # a table of another kind
