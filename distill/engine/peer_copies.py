"""Copies the state of a run into the memory of two nodes every so many steps, beside training.

    loop     gather full tensors, copy them into files that lie in memory     (training waits for this)
    thread   send the files to the next node; compare checksums; write the manifests

What is lost with a node are the steps since the last complete copy began: the distance of two copies and
the steps while one is under way. So that these together are at most ``every_steps``, copies are nearer
by the steps that the last one took, down to half the distance; the ranks have agreed on that by
the time the next one begins. The last step of a phase is copied too. There are two copies: the one before stays as it is until the new one is complete on all nodes,
which ends the thread. A node is lost together with its memory, and its files lie in that of the next
one; on a single node nothing is sent, and the copy outlives the ranks but not the machine. Memory that
is full ends the copies, in one line, and never the run.
"""

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine.held_copies import Nodes, gather_json, note_cost, remove_copies
from distill.runfolder.events import Event, note
from distill.runfolder.files import make_folder, remove, replace_text
from distill.runfolder.manifest import MANIFEST, FileFacts, Manifest
from distill.runfolder.saver import ANCHOR_FILE, CheckpointPolicy, Saveable
from distill.runfolder.tensor_file import SUFFIX, header_of, num_bytes

SENT_AT_ONCE = 2**26  # bytes of one message
Tensors = Mapping[str, Tensor]


@dataclass
class Slot:
    """One of the two copies as this rank maps it: tensors by file that it writes, and bytes of these files and of those that it holds."""

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    files: dict[Path, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class CopyCost:
    """What a complete copy cost: bytes of all files, the longest time that a loop waited, which part of all time that is, seconds until it was complete."""

    phase: str
    step: int
    bytes: int
    loop_s: float
    share: float
    seconds: float


@dataclass(frozen=True)
class CopyJob:
    """One copy as its thread gets it; ``problem``: why this rank has not all of its files."""

    slot: Slot
    index: int
    manifest: Manifest
    problem: str
    started: float
    loop_s: float
    interval_s: float
    num_steps: int  # since the copy before


class _NoCopyError(Exception):
    """The copy is not complete; the same text on every rank."""

    def __init__(self, message: str, *, is_last: bool) -> None:
        super().__init__(message)
        self.is_last = is_last  # another one would fail in the same way


class PeerCopies:
    """Copies of one run; one per process, the same calls on every rank. ``cost``: of the last complete copy."""

    def __init__(
        self,
        policy: CheckpointPolicy,
        nodes: Nodes,
        group: dist.ProcessGroup,
        every_steps: int,
    ) -> None:
        """``group``: gloo, of the world, for this alone. The newest copy of before stays until another one is complete."""
        self._policy, self._nodes, self._group = policy, nodes, group
        self._every_steps = every_steps
        self._index = 0 if nodes.newest_slot is None else 1 - nodes.newest_slot
        self._slots, self._phase = (Slot(), Slot()), ""
        self._is_paused, self._problem = False, ""
        self._lag_steps, self._last_step = every_steps, 0  # nothing is known of the first one
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._last_started = time.monotonic()
        self.cost: CopyCost | None = None

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether ``step`` finished steps of a phase are copied; the same on every rank."""
        distance = copy_distance(self._every_steps, self._lag_steps)
        is_far = step - self._last_step >= distance
        return not self._is_paused and (is_far or step == num_steps)

    def prepare(self, phase: str, states: Mapping[str, Tensors], start_step: int = 0) -> None:
        """Begins to make the memory of a phase's copies, for states like these by file, so that the first copy takes no longer than others. ``start_step``: that the phase goes on from."""
        self.wait()
        self._last_started, self._last_step = time.monotonic(), start_step
        if self._is_paused:
            return
        self._slots, self._phase, self._problem = (Slot(), Slot()), phase, ""
        self._begin(lambda: self._map_written(self._index, states))

    def copy(self, phase: Saveable, step: int) -> None:
        """Begins to copy every network after ``step`` finished steps; waits for the copy before it first. Communication: gathers per group."""
        self.wait()
        if self._is_paused:
            return
        assert phase.name == self._phase, "a phase is prepared"
        started, slot = time.monotonic(), self._slots[self._index]
        remove(self._folder(phase.world_rank, self._index) / MANIFEST)  # from here on it counts not
        for trainer in phase.trainers:
            into = slot.tensors.get(trainer.name + SUFFIX)
            trainer.state(collect=into is not None, into=into)
        anchor = phase.teacher.anchor_state()
        if phase.world_rank == 0 and anchor:
            self._map_written(self._index, {ANCHOR_FILE + SUFFIX: anchor})
            for name, tensor in slot.tensors.get(ANCHOR_FILE + SUFFIX, {}).items():
                tensor.copy_(anchor[name])
        job = CopyJob(
            slot,
            self._index,
            self._policy.manifest_of(phase, step),
            self._problem,
            started,
            time.monotonic() - started,
            started - self._last_started,
            step - self._last_step,
        )
        self._last_started, self._last_step = started, step
        self._begin(lambda: self._share(job))

    def wait(self) -> None:
        """Returns when no copy is under way; what went wrong with the last is reported."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is None:
            return
        if not isinstance(self._error, _NoCopyError):
            raise self._error
        self._is_paused = self._error.is_last
        if self._nodes.rank == 0:
            end = "no more until the next start" if self._is_paused else "the next one follows"
            text = f"no copy in memory: {self._error}; {end}, checkpoints go on"
            note(self._policy.folder.parent, Event("not copied", text))

    def remove(self, *, is_saved: bool) -> None:
        """Frees the memory of all nodes, where rank 0 has the state on disk. Communication: one gather."""
        self.wait()
        if gather_json(self._group, is_saved)[0] and self._nodes.is_first_here:
            remove_copies(self._policy.folder.parent)

    def _begin(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # raised or reported by the thread that trains
                self._error = error

        self._error = None
        self._thread = Thread(target=run, daemon=True, name="peer copies")
        self._thread.start()

    # The files

    def _folder(self, rank: int, index: int) -> Path:
        return self._nodes.folder / f"rank{rank}-{index}"

    def _map_written(self, index: int, states: Mapping[str, Tensors]) -> None:
        """Maps the files that this rank writes into one of the two copies, of states like these; the older copy there counts no more."""
        folder, slot = self._folder(self._nodes.rank, index), self._slots[index]
        _empty(folder, {*states, *(path.name for path in slot.files)})
        for file, like in states.items():
            if file in slot.tensors:
                continue
            header, order = header_of(like)
            size, start = len(header) + num_bytes(like), len(header)
            try:
                buffer = map_file(folder / file, size)
            except OSError as error:
                self._problem = self._describe(error, size)
                return
            buffer.zero_()  # the first touch, not by the loop
            buffer[:start] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
            slot.files[folder / file], slot.tensors[file] = buffer, {}
            for name in order:
                stop = start + num_bytes({name: like[name]})
                part = buffer[start:stop].view(like[name].dtype)
                slot.tensors[file][name], start = part.view(like[name].shape), stop

    def _describe(self, error: OSError, size: int) -> str:
        host, folder = self._nodes.hosts[self._nodes.rank], self._nodes.folder.parent.parent
        free = shutil.disk_usage(folder).free
        return (
            f"rank {self._nodes.rank} on {host} has no room for {size:,} bytes in {folder}, "
            f"where {free:,} are free ({error.strerror})"
        )

    # The exchange, by the thread

    def _share(self, job: CopyJob) -> None:
        """Sends and receives, compares, writes the manifests, and makes the memory of the next copy. Communication: six gathers, and the files of this rank to one other."""
        rank, index = self._nodes.rank, job.index
        folder = self._folder(rank, index)
        files = {path.name: each for path, each in job.slot.files.items() if path.parent == folder}
        sizes = {name: each.numel() for name, each in files.items()}
        rows = gather_json(self._group, [sizes, job.loop_s])
        received, problem = {}, job.problem
        try:
            received = self._map_received(job, [row[0] for row in rows])
        except OSError as error:
            needed = sum(
                sum(rows[writer][0].values()) for writer in self._writers() if writer != rank
            )
            problem = problem or self._describe(error, needed)
        self._agree(problem, is_last=True)
        works = list(self._launch(files, received))
        written = {name: _facts(each) for name, each in files.items()}
        for work in works:
            work.wait()
        heard = {
            writer: {name: _facts(each) for name, each in theirs.items()}
            for writer, theirs in received.items()
        }
        everywhere = gather_json(self._group, written)
        damaged = [writer for writer, facts in heard.items() if facts != everywhere[writer]]
        host = self._nodes.hosts[rank]
        self._agree(
            f"what rank {damaged[0]} sent to rank {rank} on {host} is damaged" if damaged else ""
        )
        facts = {name: FileFacts(**each) for row in everywhere for name, each in row.items()}
        text = job.manifest.model_copy(update={"files": facts}).to_text()
        for writer in {*(received), *([rank] if files else [])}:
            replace_text(self._folder(writer, index) / MANIFEST, text)
        seconds = time.monotonic() - job.started
        lag = math.ceil(seconds / max(job.interval_s, 1e-9) * job.num_steps)
        self._lag_steps = max(gather_json(self._group, lag))
        loop_s = max(row[1] for row in rows)
        self.cost = CopyCost(
            job.manifest.phase,
            job.manifest.step,
            sum(sum(row[0].values()) for row in rows),
            loop_s,
            loop_s / max(job.interval_s, loop_s),
            time.monotonic() - job.started,
        )
        if rank == 0:
            note_cost(self._policy.folder.parent, self._nodes.folder.name, asdict(self.cost))
        self._index = 1 - index
        if not self._slots[self._index].tensors:  # the older copy is of another phase or start
            self._map_written(self._index, job.slot.tensors)

    def _agree(self, problem: str, *, is_last: bool = False) -> None:
        """Raises the first rank's problem on all of them, if there is one. Communication: one gather."""
        for text in gather_json(self._group, problem):
            if text:
                raise _NoCopyError(text, is_last=is_last)

    def _writers(self) -> list[int]:
        """The ranks of another node whose files this rank holds."""
        ranks = range(len(self._nodes.hosts))
        return [rank for rank in ranks if self._nodes.holder_of(rank) == self._nodes.rank]

    def _map_received(
        self, job: CopyJob, sizes: list[dict[str, int]]
    ) -> dict[int, dict[str, Tensor]]:
        """Memory for the files of other ranks that this one holds, by rank."""
        received = {}
        for writer in self._writers():
            folder = self._folder(writer, job.index)
            _empty(folder, sizes[writer].keys())
            for name, size in sizes[writer].items():
                mapped = job.slot.files.get(folder / name)
                if mapped is None or mapped.numel() != size:
                    job.slot.files[folder / name] = map_file(folder / name, size)
            received[writer] = {name: job.slot.files[folder / name] for name in sizes[writer]}
        return {writer: files for writer, files in received.items() if files}

    def _launch(
        self, files: Mapping[str, Tensor], received: Mapping[int, Mapping[str, Tensor]]
    ) -> Iterator[Any]:
        """Sends this rank's files, and receives those that it holds, in the order of their names."""
        holder = self._nodes.holder_of(self._nodes.rank)
        for name in sorted(files) if holder is not None else ():
            for part in files[name].split(SENT_AT_ONCE):
                yield dist.isend(part, holder, group=self._group)
        for writer, theirs in received.items():
            for name in sorted(theirs):
                for part in theirs[name].split(SENT_AT_ONCE):
                    yield dist.irecv(part, writer, group=self._group)


def copy_distance(every_steps: int, lag_steps: int) -> int:
    """Steps from one copy to the next, so that with those while a copy is under way at most ``every_steps`` are lost; never less than half of them."""
    return max(every_steps - lag_steps, (every_steps + 1) // 2)


def _empty(folder: Path, names: Collection[str]) -> None:
    """Removes the manifest of a copy, which counts no more, and the files of other names."""
    remove(folder / MANIFEST)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name not in names:
            remove(path)


def map_file(path: Path, size: int) -> Tensor:
    """Bytes of a file in memory, all of which are there.

    Raises:
        OSError: there is no room, which would be a bus error later.
    """
    if path.is_file() and path.stat().st_size != size:
        remove(path)  # never cut: a mapping of before may be in use
    make_folder(path.parent)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        remove(path)
        raise
    finally:
        os.close(descriptor)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def _facts(content: Tensor) -> dict[str, Any]:
    """Checksum and size, as a manifest has them."""
    return {"sha256": hashlib.sha256(content.numpy().data).hexdigest(), "bytes": content.numel()}
