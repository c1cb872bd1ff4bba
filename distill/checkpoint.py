"""Resumable state on disk: a folder of safetensors and a manifest, complete or absent.

    checkpoints/gram-000040/{<network>.safetensors ..., manifest.json}     checkpoints/latest (a
    text file naming the folder)

Written aside, synced to disk, renamed; the manifest, with size and sha256 of every file, is written
last inside the folder, before the rename. Tensors are whole and named, so any number of ranks and
any placement can load them. No pickle.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.errors import CheckpointError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds: finished steps of which phase, of which recipe."""

    format_version: int
    phase: str
    step: int
    recipe_hash: str
    files: dict[str, dict[str, str | int]]


def checkpoint_name(phase: str, step: int) -> str:
    """Folder name of a checkpoint."""
    return f"{phase}-{step:07d}"


def staging_folder(folder: Path, phase: str, step: int) -> Path:
    """Where files are written before ``commit``; created if needed."""
    staging = folder / f".{checkpoint_name(phase, step)}.part"
    staging.mkdir(parents=True, exist_ok=True)
    return staging


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, on disk when this returns."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        path,
        {"format": "pt"},
    )
    _sync(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error})",
            fix="Delete this checkpoint folder to go on from the one before it.",
        ) from error


def commit(folder: Path, phase: str, step: int, recipe_hash: str, keep: int) -> Path:
    """Turns the staging folder into a checkpoint, points ``latest`` at it, and removes all but the newest ``keep``."""
    staging = staging_folder(folder, phase, step)
    files: dict[str, dict[str, str | int]] = {
        path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size}
        for path in sorted(staging.glob("*.safetensors"))
    }
    manifest = Manifest(FORMAT_VERSION, phase, step, recipe_hash, files)
    _write_text(staging / "manifest.json", json.dumps(asdict(manifest), indent=2))
    final = folder / checkpoint_name(phase, step)
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
    _sync(folder)
    _write_text(folder / "latest", final.name)
    others = [
        path for path in folder.iterdir() if (path / "manifest.json").is_file() and path != final
    ]
    others.sort(key=lambda path: (path / "manifest.json").stat().st_mtime_ns)
    for old in others[: max(0, len(others) - keep + 1)]:
        shutil.rmtree(old)
    return final


def find_latest(folder: Path, recipe_hash: str) -> tuple[Path, Manifest] | None:
    """The newest complete checkpoint whose files match their checksums, or None.

    Raises:
        CheckpointError: it was written by another recipe, so going on from it would mix two runs.
    """
    if not folder.is_dir():
        return None
    found = [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and (path / "manifest.json").is_file()
    ]
    for path in sorted(
        found, key=lambda path: (path / "manifest.json").stat().st_mtime_ns, reverse=True
    ):
        manifest = _read_manifest(path / "manifest.json")
        if manifest is None or not _is_whole(path, manifest):
            continue
        if manifest.recipe_hash != recipe_hash:
            raise CheckpointError(
                f"{path}: belongs to another version of this recipe (its results would differ)",
                fix="Pass --fresh to start over, or --name NEW to keep both.",
            )
        return path, manifest
    return None


def _read_manifest(path: Path) -> Manifest | None:
    try:
        manifest = Manifest(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return manifest if manifest.format_version == FORMAT_VERSION else None


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    for name, facts in manifest.files.items():
        path = folder / name
        if (
            not path.is_file()
            or path.stat().st_size != facts["bytes"]
            or _sha256(path) != facts["sha256"]
        ):
            return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text + "\n")
    _sync(aside)
    aside.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
