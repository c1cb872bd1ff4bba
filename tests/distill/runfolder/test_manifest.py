import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.errors import CheckpointError
from distill.runfolder.files import make_folder, read_back, replace_text, write_file
from distill.runfolder.manifest import (
    FORMAT_VERSION,
    Manifest,
    SaveFailure,
    clean,
    collect,
    commit,
    find_latest,
    next_number,
    read_manifest,
    record_done,
    record_failed,
    staging_folder,
)
from distill.runfolder.tensor_file import encode, num_bytes, read_tensors
from tests.support.full_disk import small_files

FILE = "teacher.safetensors"


def ignore(_: str) -> None:
    pass


def save(folder: Path, step: int, keep: int = 3, *, is_milestone: bool = False) -> Path:
    staging = staging_folder(folder, "base", step)
    make_folder(staging)
    tensors = {"step": torch.tensor([float(step)])}
    record_done(staging / FILE, write_file(staging / FILE, encode(tensors)))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        number=next_number(folder),
        phase="base",
        step=step,
        num_ranks=1,
        is_milestone=is_milestone,
        recipe_hash="hash",
        networks={},
        files=collect(staging, {FILE: 0}, 1.0, {}),
    )
    return commit(folder, staging, manifest, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_commit__latest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2)
    found = find_latest(tmp_path, "hash", ignore)
    assert found is not None and (found[1].phase, found[1].step) == ("base", 40)
    assert names(tmp_path) == ["base-0000030", "base-0000040", "latest"]
    assert (tmp_path / "latest").read_text() == "base-0000040\n"
    assert read_tensors(found[0] / FILE)["step"].item() == 40.0
    assert names(found[0]) == ["manifest.json", FILE]


def test_commit__milestones_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step, keep=1, is_milestone=step in (20, 40))
    assert names(tmp_path) == ["base-0000020", "base-0000040", "base-0000050", "latest"]


def test_commit__a_file_that_reads_back_differently_is_refused_and_old_ones_stay(
    tmp_path: Path,
) -> None:
    save(tmp_path, 10, keep=1)
    staging = staging_folder(tmp_path, "base", 20)
    make_folder(staging)
    written = write_file(staging / FILE, [b"what was meant"])
    (staging / FILE).write_bytes(b"what was wrote")
    record_done(staging / FILE, written)
    manifest = read_manifest(tmp_path / "base-0000010" / "manifest.json")
    assert manifest is not None
    files = collect(staging, {FILE: 0}, 1.0, {})
    with pytest.raises(CheckpointError, match="does not match its checksum after writing"):
        commit(tmp_path, staging, manifest.model_copy(update={"files": files, "step": 20}), 1)
    found = find_latest(tmp_path, "hash", ignore)
    assert found is not None and found[1].step == 10


def test_find_latest__what_file_systems_put_beside_checkpoints_is_none(tmp_path: Path) -> None:
    for name in ("lost+found", "@eaDir", ".snapshot", "notes-12"):
        (tmp_path / name).mkdir()
    assert find_latest(tmp_path, "hash", ignore) is None
    save(tmp_path, 10)
    found = find_latest(tmp_path, "hash", ignore)
    assert found is not None and found[1].step == 10


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("flip", "does not match its checksum"),
        ("cut", "bytes, not"),
        ("gone", "cannot be read"),
        ("manifest", "manifest.json is missing or damaged"),
        ("blank", "manifest.json is missing or damaged"),
        ("none", "manifest.json is missing or damaged"),
    ],
)
def test_find_latest__a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str, told: str, tmp_path: Path
) -> None:
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    file, manifest = newest / FILE, newest / "manifest.json"
    data, text = file.read_bytes(), manifest.read_text()
    if damage == "flip":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        file.write_bytes(data[:-3])
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(text.replace('"step": 20', '"step": 21'))
    elif damage == "blank":
        manifest.write_text(text.replace("\n  ", "\n\t ", 1))
    else:
        manifest.unlink()
    lines: list[str] = []
    found = find_latest(tmp_path, "hash", lines.append)
    assert found is not None and found[1].step == 10
    assert len(lines) == 1 and lines[0].startswith("base-0000020 is not used: ")
    assert told in lines[0]
    save(tmp_path, 20)  # the run comes to the same step again
    found = find_latest(tmp_path, "hash", ignore)
    assert found is not None and found[1].step == 20


def test_find_latest__refuses_to_start_over_when_everything_is_damaged(tmp_path: Path) -> None:
    (save(tmp_path, 10) / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in it is damaged, base-0000010"):
        find_latest(tmp_path, "hash", ignore)
    (tmp_path / "base-0000010" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in it is damaged, base-0000010"):
        find_latest(tmp_path, "hash", ignore)


def test_find_latest__an_unfinished_save_does_not_count_and_is_cleaned(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "none", "hash", ignore) is None
    staging = staging_folder(tmp_path, "base", 10)
    make_folder(staging)
    write_file(staging / FILE, encode({"step": torch.zeros(1)}))
    (tmp_path / ".latest.part").touch()
    (tmp_path / ".base-0000001.gone").mkdir()
    assert find_latest(tmp_path, "hash", ignore) is None
    clean(tmp_path)
    assert names(tmp_path) == []


def test_find_latest__refuses_another_recipe(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match="belongs to another version of this recipe"):
        find_latest(tmp_path, "other", ignore)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "9" * 5000, "[" * 100_000, "{}", "\0"])
def test_read_manifest__of_anything_else_is_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    assert read_manifest(tmp_path / "manifest.json") is None


def test_read_manifest__a_name_that_leaves_the_folder_is_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, 10) / "manifest.json"
    manifest = read_manifest(path)
    assert manifest is not None
    outside = manifest.model_copy(update={"files": {"../../etc/passwd": manifest.files[FILE]}})
    path.write_text(outside.to_text())
    assert read_manifest(path) is None


@small_files()
def test_collect__names_rank_file_and_missing_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"weight": torch.zeros(2**16)}
    path = tmp_path / FILE
    with pytest.raises(OSError, match="File too large") as caught:
        write_file(path, encode(tensors))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 62_144}))
    record_failed(path, caught.value, num_bytes(tensors))
    assert names(tmp_path) == [f"{FILE}.failed"]
    told = (
        r"rank 3 could not write teacher.safetensors of 262,144 bytes \(File too large\); "
        r"200,000 bytes are missing, 62,144 are free"
    )
    with pytest.raises(CheckpointError, match=told):
        collect(tmp_path, {FILE: 3}, 1.0, {})


def test_collect__names_a_rank_that_does_not_come(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank 5 did not finish teacher\.safetensors within"):
        collect(tmp_path, {FILE: 5}, 0.0, {})


def test_write_file__counts_and_hashes_what_is_there(tmp_path: Path) -> None:
    assert write_file(tmp_path / "a", [b"one", b"", b"two"]) == read_back(tmp_path / "a")
    replace_text(tmp_path / "b", "text")
    assert (tmp_path / "b").read_text() == "text" and names(tmp_path) == ["a", "b"]


def test_encode__is_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "wide": torch.randn(3, 5).T,
        "half": torch.randn(3).bfloat16(),
        "none": torch.empty(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "whole": torch.arange(4),
        "truth": torch.tensor([True, False]),
    }
    write_file(tmp_path / FILE, encode(tensors))
    read = load_file(tmp_path / FILE)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_read_tensors__names_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be read"):
        read_tensors(path)
    with pytest.raises(CheckpointError, match=r"y\.safetensors: cannot be read"):
        read_tensors(tmp_path / "y.safetensors")


def test_record_failed__a_disk_without_one_free_byte_takes_an_empty_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("distill.runfolder.manifest.replace_text", refuse)
    full = OSError(errno.ENOSPC, "No space left on device")
    failure = record_failed(tmp_path / FILE, full, 100)
    assert failure.reason == "No space left on device" and failure.bytes == 100
    with pytest.raises(CheckpointError, match=r"rank 3 could not .* \(no room for the reason"):
        collect(tmp_path, {FILE: 3}, 600.0, {})
    nowhere = tmp_path / "gone" / FILE
    assert record_failed(nowhere, full, 100).free == 0 and not nowhere.parent.exists()


def test_collect__of_a_lost_checkpoint_is_not_waited_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.runfolder.manifest.SETTLE_S", 0.1)
    failed = {"mine": SaveFailure(reason="No space left on device", bytes=100, free=30)}
    with pytest.raises(CheckpointError, match=r"rank 0 could not write mine .* 70 bytes are miss"):
        collect(tmp_path, {"mine": 0, FILE: 1}, 600.0, failed)
