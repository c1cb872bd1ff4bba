"""Saves and restores the trained networks of a phase, each by its group, on any layout.

    loop      gather full tensors, copy them to host memory        (training waits for this; the
              memory of the save before is written over, since the first touch of new memory takes
              longer than the copy; what the caller holds in host memory is not copied again)
    writer    every rank: hash, write, sync, leave a record         (a thread; training goes on)
    committer world rank 0: wait for all records, commit            (the same thread, after its files)

One save is under way at a time: the next one, and the end of a phase, wait for it. A save that
fails is reported in one line, and training continues with the checkpoints that are there.
"""

import errno
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from torch import Tensor

from distill.errors import CheckpointError
from distill.runfolder import manifest as checkpoint
from distill.runfolder.files import make_folder, write_file
from distill.runfolder.manifest import Manifest, NetworkFacts, SaveFailure, TeacherFacts
from distill.runfolder.status import RunState
from distill.runfolder.tensor_file import SUFFIX, encode, num_bytes, read_tensors

ANCHOR_FILE = (
    "gram-anchor"  # not a legal network name: those have no file of this name in a checkpoint
)
RECIPE_FILE = "recipe.yaml"
States = Mapping[str, Mapping[str, Tensor]]  # by network
NONE_HELD: States = MappingProxyType({})
RECORDS_TIMEOUT_S = 600.0  # for all ranks to have written; a stalled network file system recovers


@runtime_checkable
class Listener(Protocol):
    """Receives the result of every save; the run's recorder."""

    def show(self, state: RunState) -> None:
        """What the run does now."""
        ...

    def saving(self) -> None:
        """A save begins."""
        ...

    def saved(self, phase: str, step: int, path: str) -> None:
        """A checkpoint is complete."""
        ...

    def unsaved(self, message: str) -> None:
        """A checkpoint could not be written."""
        ...


@runtime_checkable
class Placed(Protocol):
    """Where a network trains."""

    @property
    def name(self) -> str:
        """Its label in the recipe; names its file."""
        ...

    @property
    def first_rank(self) -> int:
        """The world rank that writes the file."""
        ...


@runtime_checkable
class Layout(Protocol):
    """Which networks train in the full job."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the job."""
        ...

    @property
    def placements(self) -> Sequence[Placed]:
        """One for each network."""
        ...


@runtime_checkable
class Trained(Protocol):
    """A network that trains on a group of ranks."""

    @property
    def name(self) -> str:
        """Its label in the recipe; names its file."""
        ...

    @property
    def placement(self) -> Placed:
        """Where it trains."""
        ...

    def state(
        self, *, collect: bool = True, into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Full tensors by name, nothing without ``collect``; written over those of ``into``. Communication: gathers over its group."""
        ...

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of ``state``. No communication."""
        ...


@runtime_checkable
class Anchored(Protocol):
    """A teacher that may have a Gram anchor."""

    def anchor_state(self) -> dict[str, Tensor]:
        """The anchor's full tensors by name, nothing without an anchor. Collective where it is sharded."""
        ...


@runtime_checkable
class Saveable(Protocol):
    """What is saved of a phase."""

    @property
    def name(self) -> str:
        """The phase's name; part of the checkpoint's."""
        ...

    @property
    def world_rank(self) -> int:
        """This rank; rank 0 commits."""
        ...

    @property
    def plan(self) -> Layout:
        """Which networks train, on this rank or another."""
        ...

    @property
    def trainers(self) -> Sequence[Trained]:
        """Networks that train on this rank."""
        ...

    @property
    def teacher(self) -> Anchored:
        """Holds the Gram anchor."""
        ...


@dataclass(frozen=True)
class CheckpointPolicy:
    """Where checkpoints lie, which run they belong to, and which of them stay.

    ``networks``: the manifest's entry of each student. ``milestones``: of every so many steps of a
    phase the first checkpoint stays for ever. ``recipe``: the resolved recipe. ``teacher``: the
    files of a teacher that the run does not train.
    """

    folder: Path
    recipe_hash: str
    networks: Mapping[str, NetworkFacts]
    recipe: str
    max_to_keep: int
    milestones: int | None
    teacher: TeacherFacts | None = None

    def manifest_of(self, phase: Saveable, step: int) -> Manifest:
        """The manifest of a phase's state after ``step`` finished steps, without number and files."""
        names = [placement.name for placement in phase.plan.placements]
        return Manifest(
            format_version=checkpoint.FORMAT_VERSION,
            number=0,  # known when it is committed
            phase=phase.name,
            step=step,
            num_ranks=phase.plan.num_ranks,
            is_milestone=False,
            recipe_hash=self.recipe_hash,
            networks={name: self.networks[name] for name in names if name in self.networks},
            files={},
            teacher=self.teacher,
        )


@dataclass(frozen=True)
class SaveJob:
    """One save of one rank: the files it writes, and, for the committer, who writes which."""

    staging: Path
    files: Mapping[str, Mapping[str, Tensor]]
    manifest: Manifest | None
    expected: Mapping[str, int]


class Saver:
    """Writes checkpoints of one run; one per process, the same calls on every rank."""

    def __init__(
        self, policy: CheckpointPolicy, recorder: Listener, last_saved: tuple[str, int] | None
    ) -> None:
        """``last_saved``: phase and step of the checkpoint that the run goes on from."""
        self._checkpoint_policy, self._recorder = policy, recorder
        self._last_saved = last_saved
        self._thread: Thread | None = None
        self._order: SaveJob | None = None
        self._copies: dict[str, Mapping[str, Tensor]] = {}  # by file, of the phase of that name
        self._copied_phase = ""
        self._committed: Path | None = None
        self._error: BaseException | None = None
        self.is_saved = (
            True  # the last save did not fail, as far as this rank knows; world rank 0 knows
        )

    def prepare(self, phase: Saveable, held: States = NONE_HELD) -> States:
        """Makes and touches the memory of a phase's saves before its first step; it by file, as this rank writes them. ``held`` as for ``save``. Communication: gathers per group."""
        self.wait()
        return self._gather(phase, held)

    def save(self, phase: Saveable, step: int, held: States = NONE_HELD) -> None:
        """Begins to save every network after ``step`` finished steps. Communication: gathers per group.

        Returns as soon as the state is in host memory; waits for the save before it first. ``held``: states of
        networks that this rank trains alone, in host memory that stays as it is until the save has ended.
        """
        self.wait()
        self._recorder.saving()
        files = self._gather(phase, held)
        anchor = phase.teacher.anchor_state()
        if phase.world_rank == 0 and anchor:
            files[ANCHOR_FILE + SUFFIX] = {
                name: each.to("cpu", copy=True) for name, each in anchor.items()
            }
        self._begin(self._order_of(phase, step, files))
        self._recorder.show("training")

    def _gather(self, phase: Saveable, held: States) -> dict[str, Mapping[str, Tensor]]:
        """The states that this rank writes, by file."""
        if phase.name != self._copied_phase:
            self._copies, self._copied_phase = {}, phase.name
        for trainer in phase.trainers:
            if trainer.name in held:
                continue
            is_first = trainer.placement.first_rank == phase.world_rank
            file = trainer.name + SUFFIX
            state = trainer.state(collect=is_first, into=self._copies.get(file))
            if is_first:
                self._copies[file] = {name: each.cpu() for name, each in state.items()}
        return {**self._copies, **{name + SUFFIX: state for name, state in held.items()}}

    def report(self) -> None:
        """Reports, once, the result of a save that has ended. Raises what only a bug of ours can raise."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread.join()
        self._thread = None
        order, error = self._order, self._error
        self._order, self._error, self.is_saved = None, None, error is None
        assert order is not None, "a thread without an order"
        if isinstance(error, CheckpointError | OSError):
            note = "the checkpoints before it are kept"
            name = order.staging.name.removeprefix(".").removesuffix(".part")
            self._recorder.unsaved(f"checkpoint {name} was not saved: {error}; {note}")
        elif error is not None:
            raise error
        elif self._committed is not None and order.manifest is not None:
            self._last_saved = order.manifest.phase, order.manifest.step
            path = self._committed.relative_to(self._checkpoint_policy.folder.parent)
            self._recorder.saved(*self._last_saved, str(path))

    def wait(self) -> None:
        """Returns when no save is under way, and reports the result of the last."""
        if self._thread is not None:
            self._thread.join()
            self.report()

    def _order_of(
        self, phase: Saveable, step: int, files: Mapping[str, Mapping[str, Tensor]]
    ) -> SaveJob:
        policy = self._checkpoint_policy
        staging = checkpoint.staging_folder(policy.folder, phase.name, step)
        if phase.world_rank != 0:
            return SaveJob(staging, files, None, {})
        expected = {p.name + SUFFIX: p.first_rank for p in phase.plan.placements}
        expected |= dict.fromkeys([*files, RECIPE_FILE], 0)
        before = self._last_saved
        base = before[1] if before is not None and before[0] == phase.name else 0
        every = policy.milestones
        is_milestone = every is not None and step // every > base // every
        manifest = policy.manifest_of(phase, step).model_copy(update={"is_milestone": is_milestone})
        return SaveJob(staging, files, manifest, expected)

    def _begin(self, order: SaveJob) -> None:
        self._order, self._committed, self._error = order, None, None
        # a daemon: a rank that fails ends at once, and what it was writing never counts
        self._thread = Thread(target=self._write, args=(order,), daemon=True, name="saver")
        self._thread.start()

    def _write(self, order: SaveJob) -> None:
        try:
            if not self._checkpoint_policy.folder.parent.is_dir():  # it would be made anew, half
                raise FileNotFoundError(errno.ENOENT, "the run folder is gone")
            failed: dict[str, SaveFailure] = {}
            for name, tensors in order.files.items():
                failed |= write_part(order.staging / name, encode(tensors), num_bytes(tensors))
            if order.manifest is not None:
                self._committed = self._commit(order, order.manifest, failed)
        except BaseException as error:  # reported by the thread that trains
            self._error = error

    def _commit(
        self, order: SaveJob, manifest: Manifest, failed: Mapping[str, SaveFailure]
    ) -> Path:
        folder = self._checkpoint_policy.folder
        recipe = self._checkpoint_policy.recipe.encode()
        try:
            failed = {**failed, **write_part(order.staging / RECIPE_FILE, [recipe], len(recipe))}
            files = checkpoint.collect(order.staging, order.expected, RECORDS_TIMEOUT_S, failed)
            number = checkpoint.next_number(folder)
            manifest = manifest.model_copy(update={"number": number, "files": files})
            return checkpoint.commit(
                folder, order.staging, manifest, self._checkpoint_policy.max_to_keep
            )
        except (CheckpointError, OSError):
            shutil.rmtree(order.staging, ignore_errors=True)
            raise


def write_part(
    path: Path, parts: Iterable[bytes | memoryview], size: int
) -> dict[str, SaveFailure]:
    """One file and its record; its name and why, where it could not be written."""
    try:
        make_folder(path.parent)
        checkpoint.record_done(path, write_file(path, parts))
    except OSError as error:
        return {path.name: checkpoint.record_failed(path, error, size)}
    return {}


def restore(phase: Saveable, found: tuple[Path, Manifest]) -> None:
    """Loads every network of the phase that the checkpoint holds; others keep their fresh weights. No communication: each rank reads what it needs."""
    path, manifest = found
    for trainer in phase.trainers:
        if trainer.name + SUFFIX in manifest.files:
            trainer.load_state(read_tensors(path / (trainer.name + SUFFIX)))


def saved_anchor(saved: Path) -> dict[str, Tensor]:
    """The Gram anchor's weights in a checkpoint of a Gram stage."""
    return read_tensors(saved / (ANCHOR_FILE + SUFFIX))
