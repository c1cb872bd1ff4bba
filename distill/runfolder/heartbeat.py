"""Where a rank is, for the watchdog: one small record per rank, rewritten twice a second by a separate thread.

The loop only sets a name when it turns to something else (``enter``, about a microsecond). The thread
writes it down with the time since the last change, how long that may take, and where the main
thread stands. So a file shows three things apart from each other: the process runs (the file
changes), it moves (the activity changes), and whether it waits for others (it stands inside a
collective, or waits for a device whose work may wait for them) or others wait for it.

Ranks write to a folder in their node's memory, the board; one rank of each node publishes all of its
node's records in one file of the run folder (``distill.launch.node_watch``), the more seldom the more
nodes there are. ``read_records`` reads either folder.

Each file is written in place and closed, never renamed: a network file system shows the new bytes
to the process that opens it next.
"""

import faulthandler
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from distill.runfolder.process_identity import ProcessIdentity, this_process

BEAT_S = 0.5
FIRST_TIMES = 2  # an activity's first occurrences compile, connect, warm caches
FIRST_ALLOWED_S = 600.0  # as long as a collective may take
SLOWER = (
    8.0  # times the longest so far; of that the watchdog takes 0.8, so five times is never too long
)
BETWEEN_PHASES = "between phases"
LOADING_ALLOWED_S = 300.0  # storage may pause for minutes
STORAGE_ALLOWED_S = 600.0  # while storage refuses a file; the rank gives up after half of it
PAUSE_S = (
    5.0  # between two beats, or two looks: then this process did not run (Ctrl-Z, docker pause)
)
SELDOM = frozenset({"starting", BETWEEN_PHASES, "post-step", "saving"})  # now and then very long
WAITING = frozenset({"exchange", "agreeing"})  # activities that are nothing but waiting for others
# On the stack while something is compiled, never while it runs
COMPILERS = ("torch/_dynamo/convert_frame.py", "triton/compiler/compiler.py")
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
DEVICE_WAITS = ("torch/cuda/streams.py", "torch/cuda/__init__.py")  # where ``synchronize`` is
# Functions of ours that wait for a device inside a call of C, which leaves no frame: what is copied has to be
# computed, and on a GPU what is computed may wait for other ranks
COPIES = frozenset(
    {
        "onto",
        "Loader._copied",
        "AppliedFlag.send",
        "AppliedFlag.read",
        "Engine.snapshot",
        "StudentTrainer.read_metrics",
    }
)
ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / package}{os.sep}" for package in ("distill", "students", "teacher"))
RECORD_BYTES = 2048  # each record is padded to this, so that a shorter one leaves no rest
MOST_BYTES = 2**24  # of a file of records
PUBLISHED_PER_S = 16.0  # files of nodes that are written to the run folder, of all nodes together


@dataclass(frozen=True)
class HeartbeatRecord:
    """What a rank reports; ``end`` is empty while it runs, then "done" or why it ended.

    ``phase_number``: how many phases the rank has entered. ``phase_step``: the step of that phase which
    the rank trains, also while it teaches or loads for a later one. ``boot_id``, ``pid_namespace`` and
    ``start_ticks`` distinguish the process from others with its number; older records lack them.
    ``storage``: the file that storage refuses, and how, while it is tried again. ``memory_bytes``: the most that was
    reserved on its GPU, or what the process takes of the machine's memory; 0 where that is not known.
    """

    world_rank: int
    host: str
    pid: int
    beat: int
    phase: str
    phase_number: int
    phase_step: int
    activity: str
    network: str
    idle_s: float
    allowed_s: float
    is_waiting: bool
    frame: str
    end: str
    boot_id: str = ""
    pid_namespace: str = ""
    start_ticks: int = 0
    storage: str = ""
    memory_bytes: int = 0

    def describe(self) -> str:
        """Who and where, for people: rank, host, phase, step, activity, network."""
        doing = f"{self.activity} {self.network}".strip()
        where = f"{self.phase} step {self.phase_step}" if self.phase else "before the first step"
        waits = f", {self.storage}" if self.storage else ""
        return f"rank {self.world_rank} on {self.host}: {doing}, {where}{waits}"

    @property
    def process(self) -> ProcessIdentity:
        """Which process wrote the record."""
        return ProcessIdentity(
            self.host, self.boot_id, self.pid_namespace, self.pid, self.start_ticks
        )

    @property
    def progress(self) -> tuple[int, int]:
        """How far the rank is, to compare with other ranks."""
        return self.phase_number, self.phase_step


@dataclass(frozen=True)
class _Activity:
    """What the rank does, replaced at once: the thread that writes never reads half of it."""

    name: str
    network: str
    phase: str
    phase_number: int
    phase_step: int
    since_s: float


class Heartbeat:
    """One rank's record of life. ``enter`` is called by the loop, everything else happens on a thread."""

    def __init__(
        self,
        board: Path,
        world_rank: int,
        *,
        on_beat: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``board``: the folder of the node's ranks; ``on_beat`` is called on the thread after every beat."""
        self._path = record_path(board, world_rank)
        self._world_rank, self._on_beat, self._clock = world_rank, on_beat, clock
        self._process, self._main = this_process(), threading.main_thread().ident
        self._limit_s = FIRST_ALLOWED_S
        self._beat_at, self._paused_s = math.inf, 0.0
        self._now = _Activity("starting", "", "", 0, 0, self._running_s())
        self._times: dict[tuple[str, str], tuple[int, float]] = {}
        self._beats, self._end, self._storage = 0, "", ""
        self._read_memory: Callable[[], int] = resident_bytes
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def set_limit(self, limit_s: float) -> None:
        """Sets the seconds that a known activity may take, once the recipe is read; until then it may take long."""
        self._limit_s = limit_s

    def set_memory(self, read: Callable[[], int]) -> None:
        """Sets what reads the bytes of memory in use, once the device is known; the thread calls it at every beat."""
        self._read_memory = read

    def wait_for_storage(self, text: str) -> None:
        """Notes what storage refuses, empty once it answers; reading then may take minutes. Any thread may call it."""
        self._storage = text

    def enter_phase(self, phase: str, phase_step: int) -> None:
        """Begins a phase at one of its steps; the activity stays what it is."""
        before = self._now
        number = before.phase_number + 1
        self._now = replace(before, phase=phase, phase_number=number, phase_step=phase_step)

    def enter(self, activity: str, phase_step: int, network: str = "") -> None:
        """Begins another activity, for the step of the phase that this rank trains now."""
        before, now = self._now, self._running_s()
        key = (before.name, before.network)
        count, longest = self._times.get(key, (0, 0.0))
        self._times[key] = (count + 1, max(longest, now - before.since_s))
        self._now = _Activity(activity, network, before.phase, before.phase_number, phase_step, now)

    def __enter__(self) -> "Heartbeat":
        """Starts the thread."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Writes how the rank ended."""
        self._over.set()
        self._thread.join()
        self._end = "done" if error is None else f"{type(error).__name__}: {error}"[:300]
        with suppress(OSError):  # the run folder is gone, or its disk is full
            self._write()

    def record(self) -> HeartbeatRecord:
        """The record as it would be written now."""
        now = self._now
        count, longest = self._times.get((now.name, now.network), (0, 0.0))
        stands = sys._current_frames().get(self._main or 0)
        frame, is_in_wait = _frame_of(stands)
        is_first = count < FIRST_TIMES or _is_compiling(stands)
        is_known = not is_first and now.name not in SELDOM
        allowed_s = max(self._limit_s, SLOWER * longest) if is_known else FIRST_ALLOWED_S
        if now.name == "loading":
            allowed_s = max(allowed_s, LOADING_ALLOWED_S)
        if self._storage:
            allowed_s = max(allowed_s, STORAGE_ALLOWED_S)
        elif now.name == BETWEEN_PHASES and is_in_wait:
            allowed_s = self._limit_s  # a long wait there is for other ranks, not for work
        return HeartbeatRecord(
            self._world_rank,
            self._process.host,
            self._process.pid,
            self._beats,
            now.phase,
            now.phase_number,
            now.phase_step,
            now.name,
            now.network,
            max(0.0, self._running_s() - now.since_s),
            allowed_s,
            now.name in WAITING or is_in_wait,
            frame,
            self._end,
            self._process.boot_id,
            self._process.pid_namespace,
            self._process.start_ticks,
            self._storage,
            self._read_memory(),
        )

    def _running_s(self) -> float:
        """The time of the clock without pauses, in which this process was stopped or its machine suspended."""
        now = self._clock()
        gap_s = now - self._beat_at
        return now - self._paused_s - (gap_s - BEAT_S if gap_s > PAUSE_S else 0.0)

    def note_beat(self) -> None:
        """Leaves out the time since the last beat where that was a pause; the thread calls this."""
        now = self._clock()
        gap_s = now - self._beat_at
        paused_s = self._paused_s + (gap_s - BEAT_S if gap_s > PAUSE_S else 0.0)
        self._beat_at, self._paused_s = now, paused_s

    def _run(self) -> None:
        while not self._over.wait(BEAT_S):
            self.note_beat()
            with suppress(OSError):  # a full disk; the watchdog misses one beat
                self._write()
            self._on_beat()

    def _write(self) -> None:
        self._beats += 1
        _write_in_place(self._path, json.dumps(asdict(self.record())), RECORD_BYTES)


def resident_bytes() -> int:
    """Memory of the machine that this process takes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _write_in_place(path: Path, text: str, num_bytes: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, text.encode().ljust(num_bytes), 0)
    finally:
        os.close(descriptor)


def _frame_of(frame: FrameType | None) -> tuple[str, bool]:
    """File, line and function where a thread stands in our code, and whether that waits: in a collective or for a device."""
    is_in_wait, innermost = False, ""
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        is_in_wait = is_in_wait or any(part in file for part in COLLECTIVES)
        is_in_wait |= code.co_name == "synchronize" and file.endswith(DEVICE_WAITS)
        is_ours = file.startswith(OURS)
        name = Path(file).relative_to(ROOT) if is_ours else Path(*Path(file).parts[-2:])
        where = f"{name.as_posix()}:{frame.f_lineno}"
        innermost = innermost or where
        if is_ours:
            return f"{where} in {code.co_name}", is_in_wait or code.co_qualname in COPIES
        frame = frame.f_back
    return innermost, is_in_wait


def _is_compiling(frame: FrameType | None) -> bool:
    """Whether a thread stands in a compiler: a shape is new, which may be at any step."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(COMPILERS):
            return True
        frame = frame.f_back
    return False


def record_path(folder: Path, world_rank: int) -> Path:
    """Where a rank writes in its board."""
    return folder / "heartbeat" / f"rank-{world_rank:05d}.json"


def publish_records(run_folder: Path, records: Sequence[HeartbeatRecord]) -> None:
    """Writes the records of a node's ranks into the one file of the node; the folder of the run must be there."""
    first = min(record.world_rank for record in records)
    path = record_path(run_folder, 0).with_name(f"node-{first:05d}.json")
    text, num_bytes = json.dumps([asdict(each) for each in records]), RECORD_BYTES * len(records)
    try:
        _write_in_place(path, text, num_bytes)
    except FileNotFoundError:
        path.parent.mkdir(exist_ok=True)
        _write_in_place(path, text, num_bytes)


def forget_records(run_folder: Path) -> None:
    """Removes the records of an earlier start, whose nodes may have been others."""
    shutil.rmtree(record_path(run_folder, 0).parent, ignore_errors=True)


def publish_every_s(num_nodes: int) -> float:
    """Returns the seconds between two records that a node publishes: as often as it beats, more seldom in a large job."""
    return max(BEAT_S, num_nodes / PUBLISHED_PER_S)


def read_record(folder: Path, world_rank: int) -> HeartbeatRecord | None:
    """The last record of a rank; None where there is none, or it is just being written."""
    records = read_records(folder, world_rank + 1)
    return next((record for record in records if record.world_rank == world_rank), None)


def read_records(folder: Path, num_ranks: int) -> list[HeartbeatRecord]:
    """The last records of the ranks by rank, where there are any, from a board or a run folder."""
    found: dict[int, HeartbeatRecord] = {}
    for path in record_files(folder):
        for record in _records_in(path):
            before = found.get(record.world_rank)
            if record.world_rank < num_ranks and (before is None or before.beat < record.beat):
                found[record.world_rank] = record
    return [found[rank] for rank in sorted(found)]


def record_files(folder: Path) -> list[str]:
    """The files of ranks or nodes in a board or a run folder, in order."""
    try:
        with os.scandir(folder / "heartbeat") as entries:
            return sorted(entry.path for entry in entries if entry.name.endswith(".json"))
    except OSError:
        return []


def _records_in(path: str) -> list[HeartbeatRecord]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            values = json.loads(os.read(descriptor, MOST_BYTES))
        finally:
            os.close(descriptor)
        values = values if isinstance(values, list) else [values]
        return [HeartbeatRecord(**each) for each in values]
    except (OSError, ValueError, TypeError):
        return []


def last_beat_unix(run_folder: Path, recent_unix: float) -> float:
    """Returns when a record was last written, 0 where none was; the first one after ``recent_unix`` will do.

    Each file is opened, since a network file system may answer for a closed one from its memory.
    """
    last = 0.0
    for path in record_files(run_folder):
        with suppress(OSError), Path(path).open("rb") as file:
            last = max(last, os.fstat(file.fileno()).st_mtime)
        if last > recent_unix:
            break
    return last


@contextmanager
def stacks_on_signal(run_folder: Path, world_rank: int) -> Iterator[Path]:
    """Inside, SIGUSR2 appends the stacks of all threads to the rank's file; a file without any is removed at the end."""
    path = stacks_path(run_folder, world_rank)
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)
        try:
            yield path
        finally:
            faulthandler.unregister(signal.SIGUSR2)
    with suppress(OSError):  # other ranks' files, or the run folder is gone
        if path.stat().st_size == 0:
            path.unlink()
            path.parent.rmdir()


def stacks_path(run_folder: Path, world_rank: int) -> Path:
    """Where a rank's stacks are written."""
    return run_folder / "stacks" / f"rank-{world_rank:05d}.txt"
