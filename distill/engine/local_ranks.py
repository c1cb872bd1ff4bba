"""Starts the ranks of a job on this machine as processes, and gives them a way to find each other that no other user can reach.

    launcher -> one process for each rank          (forked from the server, spawned on a GPU)
    rank     -> a file in a fresh folder that only this user can enter -> process group

No rendezvous and no TCP store: both listen on every interface and believe every process that connects. The
folder is made anew for every start and removed at its end, so that nothing of an earlier start is read; that
of a launcher which was killed goes at the next start.
"""

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from distill.engine.loopback import stay_on_loopback
from distill.runfolder.process_identity import ENDED, ProcessIdentity, this_process

PREFIX = "distill-"  # of the folder of a start, among temporary files
STORE, OWNER = "store", "launcher.json"  # in it
ENDS_WITHIN_S = 10.0  # a killed process; one that the kernel holds is left to it


@dataclass(frozen=True)
class LocalRank:
    """One rank of a start on this machine, as its process is given it."""

    world_rank: int
    num_ranks: int
    store: str
    logs: str | None  # the folder of its output; None leaves it on the launcher's


@dataclass(frozen=True)
class RankProcess:
    """A rank's process, and the end of a pipe on which it sends what its function returned."""

    rank: LocalRank
    process: BaseProcess
    returned: Connection

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self.process.exitcode


@dataclass
class LocalRanks:
    """The ranks of one start. Inside a ``with``: at its end none runs and the folder of the store is gone."""

    start_method: str
    num_ranks: int
    logs: Path | None = None
    results: dict[int, Any] = field(default_factory=dict)  # of ranks that returned, by rank
    _ranks: list[RankProcess] = field(default_factory=list)
    _folder: str = ""

    def __enter__(self) -> "LocalRanks":
        remove_abandoned(Path(tempfile.gettempdir()))
        self._folder = tempfile.mkdtemp(prefix=PREFIX)  # 0700
        (Path(self._folder) / OWNER).write_text(json.dumps(asdict(this_process())))
        return self

    def __exit__(self, *exception: object) -> None:
        for each in self._ranks:
            each.process.kill()
        for each in self._ranks:
            each.process.join(ENDS_WITHIN_S)
            each.returned.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def folder(self) -> Path:
        """The folder of this start, which only this user can enter: the store's, and for what ranks leave for the launcher."""
        return Path(self._folder)

    @property
    def processes(self) -> Sequence[BaseProcess]:
        """The processes in rank order."""
        return [each.process for each in self._ranks]

    @property
    def exit_codes(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended, by rank."""
        codes = {each.rank.world_rank: each.exit_code for each in self._ranks}
        return {rank: code for rank, code in codes.items() if code is not None}

    @property
    def are_running(self) -> bool:
        """Whether a rank has not ended."""
        return len(self.exit_codes) < self.num_ranks

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        """Starts ``function(*args, store)`` on every rank; ``store`` is the path that ``join_ranks`` takes."""
        context: Any = multiprocessing.get_context(self.start_method)
        for world_rank in range(self.num_ranks):
            logs = None if self.logs is None else str(self.logs / str(world_rank))
            store = str(Path(self._folder) / STORE)
            rank = LocalRank(world_rank, self.num_ranks, store, logs)
            receive, send = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(rank, send, function, args), name=f"rank {world_rank}"
            )
            process.start()
            self._ranks.append(RankProcess(rank, process, receive))
            send.close()

    def wait(self, timeout_s: float) -> None:
        """Returns when a rank has returned or ended since the last call, or after the timeout."""
        running = [each for each in self._ranks if each.exit_code is None]
        unread = {each.returned: each for each in self._ranks if not each.returned.closed}
        ready = wait([*unread, *(each.process.sentinel for each in running)], timeout_s)
        for item in ready:
            if not isinstance(item, Connection):
                continue
            try:
                self.results[unread[item].rank.world_rank] = item.recv()
            except EOFError:  # it ended before it returned
                item.close()


def remove_abandoned(folder: Path) -> None:
    """Removes what launchers of this user left that were killed on this host; what is not known to be theirs stays."""
    for owner in folder.glob(f"{PREFIX}*/{OWNER}"):
        with suppress(OSError, ValueError, TypeError):  # another user's, or just being removed
            is_ours = owner.parent.lstat().st_uid == os.getuid()
            if is_ours and ProcessIdentity(**json.loads(owner.read_text())).state() in ENDED:
                shutil.rmtree(owner.parent, ignore_errors=True)


def _run_rank(
    rank: LocalRank, returned: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """The main function of a rank's process."""
    if rank.logs is not None:
        _redirect(Path(rank.logs))
    os.environ.update(
        RANK=str(rank.world_rank),
        WORLD_SIZE=str(rank.num_ranks),
        LOCAL_RANK=str(rank.world_rank),
        LOCAL_WORLD_SIZE=str(rank.num_ranks),
    )
    stay_on_loopback(os.environ)
    returned.send(function(*args, rank.store))


def _redirect(logs: Path) -> None:
    """Writes standard output and error of this process to files, those of libraries in C too."""
    logs.mkdir(parents=True, exist_ok=True)
    for stream, name in ((sys.stdout, "stdout.log"), (sys.stderr, "stderr.log")):
        stream.flush()
        with (logs / name).open("ab") as file:
            os.dup2(file.fileno(), 1 if name == "stdout.log" else 2)
