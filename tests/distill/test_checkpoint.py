from pathlib import Path

import pytest
import torch

from distill.checkpoint import commit, find_latest, read_tensors, staging_folder, write_tensors
from distill.errors import CheckpointError


def save(folder: Path, step: int, keep: int = 3) -> Path:
    staging = staging_folder(folder, "base", step)
    write_tensors(staging / "teacher.safetensors", {"step": torch.tensor([float(step)])})
    return commit(folder, "base", step, "hash", keep)


def test_commit__latest_is_found_and_old_ones_go(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2)
    found = find_latest(tmp_path, "hash")
    assert found is not None and (found[1].phase, found[1].step) == ("base", 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "base-0000030",
        "base-0000040",
        "latest",
    ]
    assert (tmp_path / "latest").read_text().strip() == "base-0000040"
    assert read_tensors(found[0] / "teacher.safetensors")["step"].item() == 40.0


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest"])
def test_find_latest__a_damaged_checkpoint_falls_back_to_the_one_before(
    damage: str, tmp_path: Path
) -> None:
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    file = newest / "teacher.safetensors"
    data = file.read_bytes()
    if damage == "flip":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "cut":
        file.write_bytes(data[:-3])
    elif damage == "gone":
        file.unlink()
    else:
        (newest / "manifest.json").write_text("{")
    found = find_latest(tmp_path, "hash")
    assert found is not None and found[1].step == 10


def test_find_latest__an_unfinished_save_does_not_count(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "none", "hash") is None
    staging = staging_folder(tmp_path, "base", 10)
    write_tensors(staging / "teacher.safetensors", {"step": torch.zeros(1)})
    assert find_latest(tmp_path, "hash") is None


def test_find_latest__refuses_another_recipe(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with pytest.raises(CheckpointError, match="belongs to another version of this recipe"):
        find_latest(tmp_path, "other")


def test_commit__the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 10)
    assert find_latest(tmp_path, "hash") is not None


def test_read_tensors__names_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be read"):
        read_tensors(path)
