"""Why a job ended early, in one file, and the exit code for the kind of end it was.

    failure.json   the first cause: written once per attempt, by the rank that failed, by the process that
                   found a rank hung, or by the launcher for a rank that died without a word

A rank that only lost its connection writes nothing: it is a consequence. Who then died is read from
the records that all ranks leave (``distill.runfolder.heartbeat``).
"""

import json
import signal
import socket
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from distill.errors import RankError, StorageError, StudentError, UserError
from distill.runfolder.heartbeat import (
    BEAT_S,
    HeartbeatRecord,
    publish_every_s,
    read_records,
    record_files,
)
from distill.runfolder.process_identity import ENDED

FILE = "failure.json"
# A rank died or hung: nothing is wrong with the job, start it again
LOST_EXIT_CODE = RankError.exit_code
# Of a lost connection: the other end is gone, did not answer in time, or ended the collective
CONNECTION_WORDS = (
    "onnection closed",
    "onnection reset",
    "onnection refused",
    "onnection was",
    "Broken pipe",
    "Socket closed",
    "ncclRemoteError",
    "remote process exited",
    "imed out",
    "imeout",
    "aborted",
)
MESSAGE_LETTERS = 300  # of an exception
SETTLE_S = 3.0  # for ranks that are ending to say so
FAR_S = 3.0  # silence of a rank on another host that is taken for death; six beats

FailureKind = Literal["user", "student", "error", "died", "hung"]


@dataclass(frozen=True)
class Failure:
    """The first cause. ``kind``: "user" needs a person; "student" is parked already, so the next start is without it; the others may go away when started again."""

    kind: FailureKind
    message: str
    fix: str
    exit_code: int
    details: str = ""

    def to_error(self) -> UserError:
        """As the command line reports it."""
        return UserError(self.message, fix=self.fix, exit_code=self.exit_code)


def write_failure(run_folder: Path, failure: Failure) -> None:
    """Leaves the cause unless there is one already, or no room for it."""
    with suppress(OSError), (run_folder / FILE).open("x") as file:
        json.dump(asdict(failure), file, indent=2)


def read_failure(run_folder: Path) -> Failure | None:
    """The first cause, if a complete one was left."""
    try:
        return Failure(**json.loads((run_folder / FILE).read_text()))
    except (FileNotFoundError, ValueError):
        return None


def failure_of(error: BaseException, record: HeartbeatRecord, run_folder: Path) -> Failure:
    """The cause that an exception of this rank is; call while handling it."""
    if isinstance(error, StorageError):
        where = f"rank {record.world_rank} on {record.host}: {error.message}"
        fix = f"{error.fix} --max-restarts N does so by itself."
        return Failure("error", where, fix, error.exit_code, traceback.format_exc())
    if isinstance(error, UserError):
        kind: FailureKind = "error" if isinstance(error, RankError) else "user"
        return Failure(kind, error.message, error.fix, error.exit_code, traceback.format_exc())
    text = " ".join(str(error).split())[:MESSAGE_LETTERS] or "no message"
    return Failure(
        "student" if isinstance(error, StudentError) else "error",
        f"{record.describe()}; {type(error).__name__}: {text}",
        f"The traceback is in {run_folder / FILE}; the same command resumes.",
        1,
        traceback.format_exc(),
    )


def is_lost_connection(error: BaseException) -> bool:
    """The error means that another rank is gone, not that this one did something wrong.

    An error of NCCL or gloo alone does not: memory, a driver or a wrong size may be its cause.
    """
    is_general = isinstance(error, RuntimeError | OSError)  # dist.DistError is a RuntimeError
    return is_general and any(word in str(error) for word in CONNECTION_WORDS)


def failure_of_dead(records: Sequence[HeartbeatRecord], exit_codes: dict[int, int]) -> Failure:
    """The cause when ranks died; ``exit_codes`` by rank where a launcher knows them, negative for a signal."""
    # a rank that aborts may do so because another one is gone
    order = sorted(records, key=lambda r: exit_codes.get(r.world_rank) == -signal.SIGABRT)
    messages = [
        f"{record.describe()}; {record.end or _how(exit_codes.get(record.world_rank, 0))}"
        for record in order
    ]
    if not messages:
        host = socket.gethostname()
        messages = [
            f"rank {rank} on {host}: starting; {_how(code)}" for rank, code in exit_codes.items()
        ]
    assert messages, "somebody is dead"
    more = f" (and {len(messages) - 1} more ranks)" if len(messages) > 1 else ""
    fix = "The same command resumes from the last checkpoint; --max-restarts N does so by itself."
    return Failure("died", messages[0] + more, fix, LOST_EXIT_CODE)


def find_dead(
    run_folder: Path, num_ranks: int, local_rank: int | None = None
) -> list[HeartbeatRecord]:
    """Ranks that ended without a record of it. Waits until every other has recorded how it ended, or has shown that it lives."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        records = read_records(run_folder, num_ranks)
        open_ = [record for record in records if not record.end and record.world_rank != local_rank]
        gone = [record for record in open_ if record.process.state() in ENDED]
        if gone or not open_:
            return gone
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    beats = {record.world_rank: record.beat for record in open_}
    every_s = publish_every_s(len(record_files(run_folder)))
    time.sleep(FAR_S + (2 * every_s if every_s > BEAT_S else 0.0))
    return [
        record
        for record in read_records(run_folder, num_ranks)
        if not record.end and beats.get(record.world_rank) == record.beat
    ]


def _how(exit_code: int) -> str:
    if exit_code >= 0:
        return "ended without a word"
    if exit_code == -signal.SIGABRT:
        return "ended by SIGABRT, as NCCL does where a collective fails; its log has the reason"
    with suppress(ValueError):
        return f"ended by {signal.Signals(-exit_code).name}"
    return f"ended by signal {-exit_code}"
