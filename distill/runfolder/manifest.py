"""Resumable state on disk: a folder of safetensors and a manifest, complete or absent.

    checkpoints/family-0000040/{<network>.safetensors ..., recipe.yaml, manifest.json}
    checkpoints/latest                 a text file naming the newest folder
    checkpoints/.family-0000040.part/  while it is written

Each writer leaves its files in the staging folder, and beside each a record: ``.done`` with size
and sha256, or ``.failed`` with the reason. The committer waits for all records, reads every file
back, writes the manifest, renames the folder, points ``latest`` at it, and only then removes what
is too old. The shared file system is the only channel, so no rank's training waits.

The manifest carries a checksum of itself and is compared with its canonical text: no bit of a
checkpoint can change undetected. Tensors are full and named, so any number of ranks and any placement
can load them. No pickle.
"""

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from distill.errors import CheckpointError
from distill.runfolder.files import Written, read_back, rename, replace_text, sync_folder

FORMAT_VERSION = 2
MANIFEST, LATEST = "manifest.json", "latest"
NAME = r"[^.].*-\d{7}.*"  # of a checkpoint; lost+found, @eaDir and the like are none
MAX_MANIFEST_BYTES = 2**24  # a page for each of thousands of networks
DONE, FAILED = ".done", ".failed"
SETTLE_S = 10.0  # for files of other ranks, of a checkpoint that is lost already
POLL_S = 0.02  # between two looks for a record

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$")]


class ChangedError(CheckpointError):
    """Saved state belongs to another recipe or to other images."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class FileFacts(_Facts):
    """What a file of the checkpoint must hold."""

    sha256: Digest
    bytes: Count


class NetworkFacts(_Facts):
    """Whose state it is: a hash over its recipe entry, and the step of its phase at which it joined."""

    hash: str
    first_step: Count


class TeacherFacts(_Facts):
    """The files that a family's teacher was read from, and their checksums; heads are empty where none were read."""

    weights: str
    weights_sha256: Digest
    heads: str
    heads_sha256: str


class SaveFailure(_Facts):
    """Why a writer could not write a file: the reason, bytes it needs, bytes that were free."""

    reason: str
    bytes: Count
    free: Count


NO_ROOM = SaveFailure(reason="no room for the reason either", bytes=0, free=0)


class Manifest(_Facts):
    """What a checkpoint holds: finished steps of which phase, of which recipe, on how many ranks it was written.

    ``number`` counts the checkpoints of a run. ``recipe_hash`` covers everything that decides the
    result except the list of students, which may change between save and resume.
    """

    format_version: int
    number: Count
    phase: PlainName
    step: Count
    num_ranks: Count
    is_milestone: bool
    recipe_hash: str
    networks: dict[PlainName, NetworkFacts]
    files: dict[PlainName, FileFacts]
    teacher: TeacherFacts | None = None  # also of checkpoints that 0.1.0 wrote
    checksum: str = ""

    def to_text(self) -> str:
        """The file: the one text that this manifest may have."""
        unsigned = self.model_copy(update={"checksum": ""})
        absent = {"teacher"} if self.teacher is None else set()  # as 0.1.0 wrote it
        text = unsigned.model_dump_json(indent=2, exclude=absent)
        digest = hashlib.sha256(text.encode()).hexdigest()
        signed = self.model_copy(update={"checksum": digest})
        return signed.model_dump_json(indent=2, exclude=absent) + "\n"


# Writing


def checkpoint_name(phase: str, step: int) -> str:
    """Folder name of a checkpoint."""
    return f"{phase}-{step:07d}"


def staging_folder(folder: Path, phase: str, step: int) -> Path:
    """Where files are written before ``commit``."""
    return folder / f".{checkpoint_name(phase, step)}.part"


def record_done(path: Path, written: Written) -> None:
    """Reports to the committer that a file is complete."""
    facts = FileFacts(sha256=written.sha256, bytes=written.num_bytes)
    replace_text(path.with_name(path.name + DONE), facts.model_dump_json())


def record_failed(path: Path, error: OSError, num_bytes: int) -> SaveFailure:
    """Reports to the committer that a file could not be written, and returns why; what there is of it is removed first, which makes room for the record."""
    free = 0
    with suppress(OSError):
        path.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
    failure = SaveFailure(reason=error.strerror or str(error), bytes=num_bytes, free=free)
    record = path.with_name(path.name + FAILED)
    with suppress(OSError):
        try:
            replace_text(record, failure.model_dump_json())
        except OSError:  # not one free byte; an empty file takes none
            record.touch()
    return failure


def collect(
    staging: Path,
    expected: Mapping[str, int],
    timeout_s: float,
    failed_here: Mapping[str, SaveFailure],
) -> dict[str, FileFacts]:
    """Waits for the record of every expected file; ``expected`` gives the rank that writes each.

    ``failed_here``: files that this rank could not write. Once one has failed the others have ``SETTLE_S`` to be done.

    Raises:
        CheckpointError: names the rank and the file that failed or did not come in time.
    """
    deadline = time.monotonic() + timeout_s
    files: dict[str, FileFacts] = {}
    failures, is_lost = dict(failed_here), False
    while waiting := [name for name in expected if name not in files and name not in failures]:
        for name in waiting:
            done, failed = (staging / (name + suffix) for suffix in (DONE, FAILED))
            if done.is_file():
                files[name] = FileFacts.model_validate_json(done.read_bytes())
            elif failed.is_file():
                data = failed.read_bytes()
                failures[name] = SaveFailure.model_validate_json(data) if data else NO_ROOM
        if failures and not is_lost:
            is_lost, deadline = True, min(deadline, time.monotonic() + SETTLE_S)
        if time.monotonic() > deadline:
            if is_lost:
                break
            late = next(name for name in waiting if name not in files and name not in failures)
            raise CheckpointError(
                f"rank {expected[late]} did not finish {late} within {timeout_s:.0f} s",
                fix="Look at that rank's log and at its storage.",
            )
        time.sleep(POLL_S)
    for name, failure in failures.items():
        missing = max(0, sum(each.bytes for each in failures.values()) - failure.free)
        room = f"; {missing:,} bytes are missing, {failure.free:,} are free" if missing else ""
        raise CheckpointError(
            f"rank {expected[name]} could not write {name} of {failure.bytes:,} bytes ({failure.reason}){room}",
            fix="Make room or look at the storage; the next save tries again.",
        )
    return files


def commit(folder: Path, staging: Path, manifest: Manifest, max_to_keep: int) -> Path:
    """Turns the staging folder into a checkpoint, points ``latest`` at it, and removes all but the newest ``max_to_keep`` and milestones.

    Raises:
        CheckpointError: a file does not read back as it was written; nothing else was changed.
        OSError: the same, for a manifest that cannot be written.
    """
    damage = find_damage(staging, manifest)
    if damage is not None:
        raise CheckpointError(f"{damage} after writing", fix="Look at the storage.")
    replace_text(staging / MANIFEST, manifest.to_text())
    for name in manifest.files:
        (staging / (name + DONE)).unlink()
    sync_folder(staging)
    final = _free_name(folder / checkpoint_name(manifest.phase, manifest.step), manifest.number)
    rename(staging, final)
    replace_text(folder / LATEST, final.name + "\n")
    remove_old(folder, max_to_keep)
    return final


def _free_name(final: Path, number: int) -> Path:
    """The name, or one more beside it where a damaged checkpoint of the same step has it."""
    while final.exists():
        final, number = final.with_name(f"{final.name}-{number}"), number + 1
    return final


def next_number(folder: Path) -> int:
    """Of the checkpoint to be written."""
    return 1 + max((manifest.number for _, manifest in checkpoints(folder)), default=0)


def remove_old(folder: Path, max_to_keep: int) -> None:
    """Removes all but the newest ``max_to_keep`` checkpoints and the milestones; a name goes before its content."""
    for path, manifest in checkpoints(folder)[max_to_keep:]:
        if not manifest.is_milestone:
            gone = path.with_name(f".{path.name}.gone")
            rename(path, gone)
            shutil.rmtree(gone)


def clean(folder: Path) -> None:
    """Removes what a run that died left half written or half removed. Call while no process writes."""
    leftovers = [path for path in folder.glob(".*") if path.suffix in (".part", ".gone")]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# Reading


def describe_found(found: tuple[Path, Manifest]) -> str:
    """The line of a run that goes on from a checkpoint."""
    path, manifest = found
    return f"resumes from {path.name} ({manifest.phase} step {manifest.step})"


def find_latest(
    folder: Path, recipe_hash: str, report: Callable[[str], None]
) -> tuple[Path, Manifest] | None:
    """The newest checkpoint whose files match their checksums; None where there is no checkpoint yet.

    ``report`` gets a line for each newer one that is damaged.

    Raises:
        ChangedError: it was written by another recipe, so going on from it would mix two runs.
        CheckpointError: there are checkpoints, and each is damaged.
    """
    found = checkpoints(folder)
    unreadable = sorted(set(_folders(folder)) - {path for path, _ in found})
    for path in unreadable:
        report(f"{path.name} is not used: its {MANIFEST} is missing or damaged")
    for path, manifest in found:
        damage = find_damage(path, manifest)
        if damage is not None:
            report(f"{path.name} is not used: {damage}")
            continue
        if manifest.recipe_hash != recipe_hash:
            raise ChangedError(
                f"{path}: belongs to another version of this recipe or of its images (its results would differ)",
                fix="Pass --fresh to start over, or --name NEW to keep both.",
            )
        return path, manifest
    if found or unreadable:
        newest = (found[0][0] if found else unreadable[-1]).name
        raise CheckpointError(
            f"{folder}: every checkpoint in it is damaged, {newest} too",
            fix="Bring one back from a copy, or pass --fresh to start over.",
        )
    return None


def checkpoints(folder: Path) -> list[tuple[Path, Manifest]]:
    """Checkpoints with a sound manifest, newest first; their files are not read."""
    found = []
    for path in _folders(folder):
        manifest = read_manifest(path / MANIFEST)
        if manifest is not None:
            found.append((path, manifest))
    return sorted(found, key=lambda each: each[1].number, reverse=True)


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    named = (path for path in folder.iterdir() if re.fullmatch(NAME, path.name))
    return [path for path in named if path.is_dir()]


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in a file; None where it is missing, damaged or of another format."""
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            return None
        data = path.read_bytes()
        manifest = Manifest.model_validate_json(data)
    except (OSError, ValidationError):
        return None
    is_sound = manifest.format_version == FORMAT_VERSION and manifest.to_text().encode() == data
    return manifest if is_sound else None


def find_damage(folder: Path, manifest: Manifest) -> str | None:
    """The first file that differs from the manifest, and how; None when all are."""
    for name, facts in manifest.files.items():
        try:
            num_bytes = (folder / name).stat().st_size
            if num_bytes != facts.bytes:
                return f"{name} has {num_bytes:,} bytes, not {facts.bytes:,}"
            if read_back(folder / name).sha256 != facts.sha256:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None
