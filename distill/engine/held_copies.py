"""Copies of a run's state in the memory of its nodes: where they lie, which are complete, and how one becomes a checkpoint again.

    /dev/shm/distill-copies-<user>-<folder and host>/   only this user can enter
        <run>/rank0-0/  small.safetensors ... manifest.json     what rank 0 writes, one of two copies
        <run>/rank3-1/  ...                                     of a rank on another node, the other one

A file in /dev/shm lies in memory and outlives the processes that wrote it, though not the machine. A
manifest names the files of all ranks, and is written when all of them are everywhere, so that a copy that
was being written never counts. A copy belongs to a run by an identity that the run folder holds: a run
that was started over, or another recipe, never goes on from what an earlier one left.
"""

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distill.engine.node_memory import PREFIX, memory_folder
from distill.errors import CheckpointError
from distill.runfolder import manifest as checkpoint
from distill.runfolder.files import make_folder, read_back, remove
from distill.runfolder.manifest import (
    MANIFEST,
    ChangedError,
    Manifest,
    TeacherFacts,
    describe_found,
    find_latest,
    read_manifest,
)
from distill.runfolder.saver import RECIPE_FILE, RECORDS_TIMEOUT_S, write_part
from distill.runfolder.status import write_json

IDENTITY = "copies.json"  # in a run folder
CHUNK_BYTES = 2**24


def gather_json(group: dist.ProcessGroup, value: Any) -> list[Any]:
    """Every rank's value, in rank order. Communication: two all-gathers over ``group``, of gloo."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([text.numel()]), group=group)
    row = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    row[: text.numel()] = text
    rows = [torch.empty_like(row) for _ in sizes]
    dist.all_gather(rows, row, group=group)
    return [
        json.loads(each[: int(size)].numpy().tobytes())
        for each, size in zip(rows, sizes, strict=True)
    ]


def folder_here(run_folder: Path) -> Path:
    """Where this node holds copies of a run: a name that another node, user or run folder does not have."""
    where = f"{socket.gethostname()}:{run_folder.resolve()}"
    name = hashlib.sha256(where.encode()).hexdigest()[:16]
    return memory_folder() / f"{PREFIX}{os.getuid()}-{name}"


def remove_copies(run_folder: Path) -> None:
    """Removes what this node holds of the runs of a folder, if anything."""
    with suppress(OSError):  # another user's, which is none of ours
        remove(folder_here(run_folder))


def remove_where_saved(run_folder: Path, control: dist.ProcessGroup, *, is_saved: bool) -> None:
    """Frees what earlier starts of a run left in the memory of its nodes, where rank 0 has the state on disk. Communication: one gather over ``control``."""
    rows = gather_json(control, [is_saved, f"{socket.gethostname()}:{memory_folder()}"])
    nodes = [node for _, node in rows]
    if rows[0][0] and nodes.index(nodes[dist.get_rank()]) == dist.get_rank():
        remove_copies(run_folder)


@dataclass(frozen=True)
class Nodes:
    """Which ranks share a memory, and where this rank's node holds copies.

    ``of_rank`` numbers the nodes in the order of their first ranks; ``newest_slot``: which of its two copies is the newest.
    """

    rank: int
    hosts: tuple[str, ...]
    of_rank: tuple[int, ...]
    folder: Path
    newest_slot: int | None = None

    def ranks_of(self, node: int) -> list[int]:
        """The ranks of a node."""
        return [rank for rank, each in enumerate(self.of_rank) if each == node]

    @property
    def is_first_here(self) -> bool:
        """This is the first rank of its node."""
        return self.ranks_of(self.of_rank[self.rank])[0] == self.rank

    def holder_of(self, rank: int) -> int | None:
        """The rank that holds the files of another one in the memory of the next node; None on a single node."""
        node, count = self.of_rank[rank], 1 + max(self.of_rank)
        if count == 1:
            return None
        theirs = self.ranks_of((node + 1) % count)
        return theirs[self.ranks_of(node).index(rank) % len(theirs)]


def find_nodes(run_folder: Path, control: dist.ProcessGroup) -> Nodes:
    """The nodes of a job, and the folder of this run on this one, empty of what earlier runs of the same folder left.

    Communication: two gathers over ``control``, a gloo group of the world.

    Raises:
        CheckpointError: on every rank, where the folder belongs to someone else.
    """
    rank, top = dist.get_rank(), folder_here(run_folder)
    identity = _identity(run_folder) if rank == 0 else ""
    rows = gather_json(control, [socket.gethostname(), str(memory_folder()), identity])
    keys = [f"{host}:{memory}" for host, memory, _ in rows]
    indices = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    folder = top / rows[0][2]
    nodes = Nodes(rank, tuple(row[0] for row in rows), tuple(indices[k] for k in keys), folder)
    problem = _make_private(top, folder.name) if nodes.is_first_here else ""
    if text := next(filter(None, gather_json(control, problem)), ""):
        raise CheckpointError(text, fix="Remove it, or leave checkpoint.peer out.")
    return nodes


def _identity(run_folder: Path) -> str:
    """The run's identity, made at its first start."""
    path = run_folder / IDENTITY
    with suppress(OSError, ValueError, KeyError):
        return str(json.loads(path.read_text())["run"])
    identity = secrets.token_hex(8)
    write_json(path, {"run": identity})
    return identity


def note_cost(run_folder: Path, run: str, cost: Mapping[str, Any]) -> None:
    """Writes what the last copy cost beside the identity of the run; left out where the disk is full."""
    with suppress(OSError):
        write_json(run_folder / IDENTITY, {"run": run, "last": dict(cost)})


def _make_private(top: Path, run: str) -> str:
    """Makes a run's folder that only this user can enter; why it cannot be, or nothing."""
    try:
        top.mkdir(mode=0o700, exist_ok=True)
        facts = top.lstat()
        if facts.st_uid != os.getuid() or facts.st_mode & 0o077 or top.is_symlink():
            return f"{socket.gethostname()}: {top} belongs to another user, or others may enter it"
        for entry in top.iterdir():
            if entry.name != run:
                remove(entry)
        make_folder(top / run)
    except OSError as error:
        return f"{socket.gethostname()}: {top} cannot be made ({error.strerror})"
    return ""


@dataclass(frozen=True)
class Target:
    """Where a copy becomes a checkpoint: the folder, hash, teacher and recipe of the run, how many stay, its phases in order."""

    folder: Path
    run_hash: str
    teacher: TeacherFacts | None
    recipe: str
    max_to_keep: int
    phases: Sequence[str]

    def is_of_run(self, manifest: Manifest) -> bool:
        """Whether a copy is of the same recipe, images and teacher."""
        facts = manifest.recipe_hash, manifest.teacher
        return facts == (self.run_hash, self.teacher) and manifest.phase in self.phases

    def age(self, manifest: Manifest) -> tuple[int, int]:
        """Sorts states of the run by how far it was trained."""
        return self.phases.index(manifest.phase), manifest.step


@dataclass(frozen=True)
class HeldCopy:
    """A complete copy: its manifest, for each file the ranks whose node holds it, and which of two it is."""

    manifest: Manifest
    ranks: dict[str, list[int]]
    slot: int


def find_copies(nodes: Nodes, target: Target, control: dist.ProcessGroup) -> list[HeldCopy]:
    """The complete copies of the run over all nodes, undamaged, of the same recipe and teacher. Every rank of a node reads a part. Communication: one gather."""
    neighbours = nodes.ranks_of(nodes.of_rank[nodes.rank])
    folders = sorted(nodes.folder.glob("rank*-?"))[neighbours.index(nodes.rank) :: len(neighbours)]
    found = []
    for folder in folders:
        manifest = read_manifest(folder / MANIFEST)
        if manifest is not None and target.is_of_run(manifest):
            found.append([manifest.to_text(), _sound_files(folder, manifest), int(folder.name[-1])])
    held: dict[str, HeldCopy] = {}
    for rank, rows in enumerate(gather_json(control, found)):
        for text, names, slot in rows:
            copy = held.setdefault(text, HeldCopy(Manifest.model_validate_json(text), {}, slot))
            for name in names:
                copy.ranks.setdefault(name, []).append(rank)
    return [copy for copy in held.values() if copy.ranks.keys() == copy.manifest.files.keys()]


def _sound_files(folder: Path, manifest: Manifest) -> list[str]:
    """The files of a manifest that a folder holds as they were written."""
    sound = []
    for name, facts in manifest.files.items():
        with suppress(OSError):
            if read_back(folder / name).sha256 == facts.sha256:
                sound.append(name)
    return sound


def open_memory(
    run_folder: Path, target: Target, control: dist.ProcessGroup, report: Callable[[str], None]
) -> Nodes:
    """The nodes of a run; the newest copy that they hold becomes a checkpoint where none on disk is as new. Arguments as ``adopt_newest``."""
    nodes = find_nodes(run_folder, control)
    return replace(nodes, newest_slot=adopt_newest(target, nodes, control, report))


def adopt_newest(
    target: Target, nodes: Nodes, control: dist.ProcessGroup, report: Callable[[str], None]
) -> int | None:
    """Makes the newest copy a checkpoint, if it is newer than all on disk that can be read; which of two it is, None without one.

    A rank that has a file in its memory writes it to the run folder, from where any number of ranks reads it. ``report``
    gets a line on rank 0. Communication: two gathers over ``control``.
    """
    copies = find_copies(nodes, target, control)
    if not copies:
        return None
    newest = max(copies, key=lambda copy: target.age(copy.manifest))
    is_newer = nodes.rank == 0 and _is_newer(newest, target)
    if gather_json(control, is_newer)[0]:
        _write_checkpoint(newest, target, nodes, report)
    return newest.slot


def _write_checkpoint(
    newest: HeldCopy, target: Target, nodes: Nodes, report: Callable[[str], None]
) -> None:
    """The files of a copy that this rank has; by rank 0 the checkpoint."""
    manifest = newest.manifest
    staging = checkpoint.staging_folder(target.folder, manifest.phase, manifest.step)
    failed: dict[str, checkpoint.SaveFailure] = {}
    for name, ranks in newest.ranks.items():
        if ranks[0] == nodes.rank:
            path = _find_file(nodes, manifest, name)
            failed |= write_part(staging / name, _read_chunks(path), manifest.files[name].bytes)
    if nodes.rank != 0:
        return
    hosts = ", ".join(sorted({nodes.hosts[ranks[0]] for ranks in newest.ranks.values()}))
    recipe = target.recipe.encode()
    expected = {RECIPE_FILE: 0, **{name: ranks[0] for name, ranks in newest.ranks.items()}}
    try:
        failed |= write_part(staging / RECIPE_FILE, [recipe], len(recipe))
        files = checkpoint.collect(staging, expected, RECORDS_TIMEOUT_S, failed)
        facts = {"number": checkpoint.next_number(target.folder), "files": files}
        path = checkpoint.commit(
            target.folder, staging, manifest.model_copy(update=facts), target.max_to_keep
        )
    except (CheckpointError, OSError) as error:
        report(f"the copy in memory of {hosts} could not be written to disk: {error}")
        return
    report(f"{describe_found((path, manifest))} (copy in memory of {hosts})")


def _is_newer(copy: HeldCopy, target: Target) -> bool:
    """No checkpoint that can be read is as new. Removes what a run that died left half written."""
    checkpoint.clean(target.folder)
    try:
        found = find_latest(target.folder, target.run_hash, lambda _: None)
    except ChangedError:
        return False  # reported where the checkpoint is chosen
    except CheckpointError:
        return True
    return found is None or target.age(copy.manifest) > target.age(found[1])


def _find_file(nodes: Nodes, manifest: Manifest, name: str) -> Path:
    """The file of a copy in the memory of this node."""
    paths = [folder / name for folder in sorted(nodes.folder.glob("rank*-?"))]
    text = manifest.to_text()
    return next(
        path
        for path in paths
        if path.is_file()
        and (path.parent / MANIFEST).is_file()
        and (path.parent / MANIFEST).read_text() == text
    )


def _read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            yield data
