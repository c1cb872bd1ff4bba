"""Sizes of the files that an index names."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data.build_index import build_index
from distill.data.file_sizes import GONE, file_bytes, refuse_changed
from distill.data.index import ImageIndex
from distill.errors import DataError


def test_file_bytes__of_files_and_of_the_shard_they_lie_in(tmp_path: Path) -> None:
    image = io.BytesIO()
    Image.new("RGB", (20, 10)).save(image, "png")
    files = tmp_path / "files"
    files.mkdir()
    for name in ("a.png", "b.png"):
        (files / name).write_bytes(image.getvalue())
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        tar.add(files / "a.png", "x.png")
        tar.add(files / "b.png", "y.png")
    index = build_index([files, shard], max_bad_fraction=0.0)
    sizes = file_bytes(index)
    each, whole = len(image.getvalue()), shard.stat().st_size
    assert sizes.tolist() == [each, each, whole, whole]
    replace(index, file_bytes=sizes).subset(np.array([1, 3])).save(tmp_path / "index")
    stored = ImageIndex.load(tmp_path / "index")
    assert stored.file_bytes is not None and stored.file_bytes.tolist() == [each, whole]
    refuse_changed(stored, tmp_path, "Embed again.")
    with shard.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=rf"shard.tar:y.png has {whole + 512:,} bytes"):
        refuse_changed(stored, tmp_path, "Embed again.")
    shard.unlink()
    assert file_bytes(stored).tolist() == [each, GONE]
    refuse_changed(index, tmp_path, "nobody counted: passes")
