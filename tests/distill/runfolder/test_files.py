"""A file or folder has its name only when everything in it is on the disk."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import contact_sheet
from distill.data.build_index import build_index
from distill.data.pack import pack
from distill.errors import UserError
from distill.export.save import write_heads, write_tensors
from distill.runfolder import files
from distill.runfolder.files import folder_while, make_folder, replace_text, replaced, sync
from distill.runfolder.metrics import drop_after, metrics_path
from distill.runfolder.status import write_json
from tests.support.status import ROW

Call = tuple[str, Path]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What is synced ("sync", path) and what name it gets ("name", path), in order."""
    noted: list[Call] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def note_sync(descriptor: int) -> None:
        noted.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def noting(function: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any, **more: Any) -> None:
            noted.append(("from", Path(source)))
            noted.append(("name", Path(target)))
            function(source, target, **more)

        return call

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", noting(rename))
    monkeypatch.setattr(os, "replace", noting(replace))
    return noted


def assert_synced(calls: list[Call], path: Path) -> None:
    """The content was synced before ``path`` got its name, and its folder after."""
    named = max(i for i, call in enumerate(calls) if call == ("name", path))
    kind, source = calls[named - 1]
    assert kind == "from" and source.parent == path.parent
    inside = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    for each in inside:
        written = source / each.relative_to(path) if path.is_dir() else source
        assert ("sync", written) in calls[:named], f"{written} was renamed before it was synced"
    assert ("sync", path.parent) in calls[named:], f"{path.parent} was not synced after the rename"


WRITERS: dict[str, Callable[[Path], Path]] = {}


def writer(function: Callable[[Path], Path]) -> Callable[[Path], Path]:
    WRITERS[function.__name__] = function
    return function


@writer
def text(folder: Path) -> Path:
    replace_text(folder / "text", "new")
    return folder / "text"


@writer
def status(folder: Path) -> Path:
    write_json(folder / "status.json", {"state": "training"})
    return folder / "status.json"


@writer
def weights(folder: Path) -> Path:
    write_tensors(folder, {"a": torch.ones(3)})
    return folder / "model.safetensors"


@writer
def index_of_shards(folder: Path) -> Path:
    write_tensors(folder, {"a": torch.ones(3), "b": torch.ones(3)}, shard_bytes=12)
    return folder / "model.safetensors.index.json"


@writer
def heads(folder: Path) -> Path:
    write_heads(folder / "heads.safetensors", {"dino_head.a": torch.ones(3)})
    return folder / "heads.safetensors"


@writer
def history(folder: Path) -> Path:
    path = metrics_path(folder, "small")
    path.parent.mkdir()
    path.write_text("damaged\n" + json.dumps(replace(ROW, phase="family", step=1).to_json()) + "\n")
    assert drop_after(folder, "small", phases=["family"], phase="family", step=1) == 1
    return path


@writer
def picture(folder: Path) -> Path:
    pixels = np.zeros((32, 32, 3), np.uint8)
    row = contact_sheet.Row(pixels, np.full((3, 4), [0, 0, 32, 32], np.float32))
    crops = contact_sheet.CropBatch(
        global_crops=torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8),
        local_crops=torch.zeros(1, 1, 3, 16, 16, dtype=torch.uint8),
    )
    masks = torch.zeros(1, 2, 4, dtype=torch.bool)
    return contact_sheet.render_contact_sheet([row], crops, masks, (2, 2), folder / "sheet.png")


@writer
def index(folder: Path) -> Path:
    build_index([images(folder)], max_bad_fraction=0.0).save(folder / "index")
    build_index([folder / "images"], max_bad_fraction=0.0).save(folder / "index")  # and again
    return folder / "index"


@writer
def shard(folder: Path) -> Path:
    source, out = images(folder), folder / "packed"
    pack([source], out, images_per_shard=2, max_megapixels=1.0, progress=lambda *_: None)
    return out / "shard-000000.tar"


def images(folder: Path) -> Path:
    (folder / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / "images" / f"{i}.png")
    return folder / "images"


@pytest.mark.parametrize("name", WRITERS)
def test_writers__sync_before_the_name_and_the_folder_after(
    name: str, tmp_path: Path, calls: list[Call]
) -> None:
    path = WRITERS[name](tmp_path)
    assert path.exists()
    assert_synced(calls, path)
    assert not [each.name for each in path.parent.iterdir() if each.name.startswith(".")]


@pytest.mark.parametrize("is_folder", [False, True])
def test_replaced__keeps_what_was_there_when_writing_fails(is_folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "out"

    def write(aside: Path, content: str) -> None:
        if is_folder:
            aside.mkdir()
        (aside / "file" if is_folder else aside).write_text(content)

    with replaced(path) as aside:
        write(aside, "old")
    with pytest.raises(OSError, match="full"), replaced(path) as aside:
        write(aside, "half")
        raise OSError("full")
    assert (path / "file" if is_folder else path).read_text() == "old"
    with replaced(path) as aside:
        write(aside, "new")
    assert (path / "file" if is_folder else path).read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_replaced__begins_without_what_an_earlier_process_left(tmp_path: Path) -> None:
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part" / "left").touch()
    with replaced(tmp_path / "out") as aside:
        aside.mkdir()
    assert list((tmp_path / "out").iterdir()) == []


def test_replace_text__leaves_nothing_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError("no rename")

    monkeypatch.setattr(files, "rename", fail)
    with pytest.raises(OSError, match="no rename"):
        replace_text(tmp_path / "text", "new")
    assert list(tmp_path.iterdir()) == []


def test_sync__reaches_every_file_and_folder(tmp_path: Path, calls: list[Call]) -> None:
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "file").touch()
    calls.clear()
    sync(tmp_path / "a")
    inside = [tmp_path / "a" / "b" / "file", tmp_path / "a" / "b", tmp_path / "a"]
    assert calls == [("sync", each) for each in inside]


def test_folder_while__what_it_made_goes_after_an_error(tmp_path: Path) -> None:
    with folder_while(tmp_path / "a/b"):
        (tmp_path / "a/b/kept").touch()
    with pytest.raises(ValueError, match="refused"), folder_while(tmp_path / "a/b/c/d"):
        raise ValueError("refused")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "kept"]
    with pytest.raises(ValueError, match="refused"), folder_while(tmp_path / "x/y"):
        (tmp_path / "x/other").touch()
        raise ValueError("refused")
    assert (tmp_path / "x/other").is_file() and not (tmp_path / "x/y").exists()
    with (
        pytest.raises(UserError, match=r"kept/new: cannot be made \(File exists\)"),
        folder_while(tmp_path / "a/b/kept/new"),
    ):
        pass
