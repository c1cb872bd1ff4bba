"""Which files a family's teacher is read from, so that a run goes on with no other teacher.

Where the files lie may change between a save and a resume, what they hold may not. Each file is hashed
once: its checksum stays in the run folder and counts while path, size and time of change are the same.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from distill.errors import CheckpointError
from distill.runfolder.files import read_back
from distill.runfolder.manifest import Manifest, TeacherFacts
from distill.runfolder.status import TRAINED_HEADS
from distill.weights.containers import PICKLED

CHECKSUMS = "teacher_checksums.json"  # in a run folder
Checksums = dict[str, tuple[int, int, str]]  # of a path: bytes, time of change in ns, sha256


def read_checksums(run_folder: Path) -> Checksums:
    """Returns what an earlier start noted; nothing where there is no note or it is damaged."""
    try:
        stored = json.loads((run_folder / CHECKSUMS).read_bytes())
        return {
            str(path): (int(size), int(time), str(sha))
            for path, (size, time, sha) in stored.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def teacher_facts(weights: Path, heads: Path | None, checksums: Checksums) -> TeacherFacts:
    """Returns where the teacher's weights and heads lie and what they hold; adds what had to be hashed to ``checksums``.

    Raises:
        OSError: a file cannot be read.
    """
    files = files_of_weights(weights)
    return TeacherFacts(
        weights=str(weights),
        weights_sha256=_checksum_of(files, checksums),
        heads="" if heads is None else str(heads),
        heads_sha256="" if heads is None else _checksum_of([heads], checksums),
    )


def files_of_weights(weights: Path) -> list[Path]:
    """Returns the file that is named, or those of a folder without the heads."""
    if not weights.is_dir():
        return [weights]
    found = [path for path in sorted(weights.glob("*.safetensors")) if path.name != TRAINED_HEADS]
    return found or sorted(weights.glob(PICKLED))


def refuse_another_teacher(now: TeacherFacts | None, found: tuple[Path, Manifest] | None) -> None:
    """Compares the teacher's files with those that a checkpoint was trained from.

    A checkpoint of 0.1.0 does not name them; then nothing can be compared.

    Raises:
        CheckpointError: they hold something else.
    """
    before = None if found is None else found[1].teacher
    if now is None or before is None:
        return
    for key in ("weights", "heads"):
        path, sha256 = getattr(now, key), getattr(now, f"{key}_sha256")
        path_before, sha256_before = getattr(before, key), getattr(before, f"{key}_sha256")
        if sha256 != sha256_before:
            raise CheckpointError(
                f"teacher.{key} = {path or 'none'} (sha256 {sha256[:16] or 'none'}): the run was trained from "
                f"{path_before or 'none'} (sha256 {sha256_before[:16] or 'none'})",
                fix="Name the file that the run began with, pass --fresh to start over, or --name NEW to keep both.",
            )


def _checksum_of(files: list[Path], checksums: Checksums) -> str:
    """Of one file its sha256, of several the sha256 over names and checksums."""
    digests = {path.name: _hashed_once(path, checksums) for path in files}
    return next(iter(digests.values())) if len(digests) == 1 else _sha256_of_text(digests)


def _sha256_of_text(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(
        "".join(f"{name} {sha}\n" for name, sha in digests.items()).encode()
    ).hexdigest()


def _hashed_once(path: Path, checksums: Checksums) -> str:
    facts, key = path.stat(), str(path.absolute())
    size, time_ns, sha256 = checksums.get(key, (0, 0, ""))
    if not sha256 or (size, time_ns) != (facts.st_size, facts.st_mtime_ns):
        sha256 = read_back(path).sha256
        checksums[key] = (facts.st_size, facts.st_mtime_ns, sha256)
    return sha256
