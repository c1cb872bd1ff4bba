"""How the ranks of another launcher find each other and one job, through torch's store.

    rank 0         opens the store, prepares the run folder, answers every request, collects reports, gives the go
    other ranks    connect, send a request, find the answer's nonce in the run folder, report, wait for the go

Nothing that an earlier launch left is believed, on disk or in a store that outlives it: a request has
a number that the store never gave before, and the answer holds a nonce that rank 0 drew in this launch
and wrote into ``job.json``. Why rank 0 has no job, or one rank cannot read it, ends all with one line.
"""

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public, not listed

from distill.engine.node import ranks_on_node
from distill.engine.variables import LaunchedRank
from distill.errors import SetupError, UserError
from distill.job.prepare import launch_of
from distill.runfolder.failure import LOST_EXIT_CODE

CONNECT_S = 600.0  # for every rank to be started
PREPARED_S = 1800.0  # indexing a large folder may take minutes
STORAGE_S = 60.0  # for storage to show one node what another one wrote
LEAVE_S = 10.0  # for the others to hear why rank 0 ends
SAY_EVERY_S = 30.0
LOOK_S = 0.1
LONGEST_PAUSE_S = 2.0
NAMED = 8  # ranks in a line
REQUESTS = "requests"  # in the store: how many there were
# Under the nonce: ranks that reported, the end, ranks that heard it
READ, GO, LEFT = "read", "go", "left"


@dataclass(frozen=True)
class Answer:
    """What rank 0 answers: the nonce and folder of its job, or with ``message`` why there is none."""

    nonce: str
    host: str
    folder: str
    overrides: list[str]
    message: str = ""
    fix: str = ""
    exit_code: int = 1


def open_store(here: LaunchedRank) -> Store:
    """Connects to the store of the launch; rank 0 serves it where torchrun does not.

    Raises:
        SetupError: the port is taken, or nothing answers within ``CONNECT_S``.
    """
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_server = here.rank == 0 and not is_served
    if not is_server:
        _wait_for_server(here)
    where = (here.address, here.port, here.num_ranks, is_server, timedelta(seconds=CONNECT_S))
    try:
        return TCPStore(*where, wait_for_workers=False)
    except dist.DistError as error:
        text = "cannot serve a store" if is_server else "cannot use the store of rank 0"
        raise SetupError(
            f"{here} {text} at {here.address}:{here.port} ({str(error).splitlines()[0]})",
            fix="Set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port of it.",
        ) from error


def _wait_for_server(here: LaunchedRank) -> None:
    """Returns when something listens there; torch's store would write stacks while it waits."""
    wait, where = _Wait(here, CONNECT_S), (here.address, here.port)
    while True:
        try:
            socket.create_connection(where, timeout=SAY_EVERY_S).close()
        except OSError as error:
            check = f"check that rank 0 runs, that MASTER_ADDR is its host, and that no firewall closes port {here.port}"
            wait.look(f"for rank 0 at {here.address}:{here.port} ({error})", check)
            time.sleep(wait.pause_s())
        else:
            return


class Rendezvous:
    """One rank's part of a launch, until all ranks have the same job."""

    def __init__(self, here: LaunchedRank, store: Store) -> None:
        self.nonce = secrets.token_hex(8) if here.rank == 0 else ""
        self._here, self._store = here, PrefixStore("distill", store)
        self._num_answered = 0

    def store_of_ranks(self) -> Store:
        """Returns what the process group is made from: keys that no other launch wrote."""
        return PrefixStore(self._key("ranks"), self._store)

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """On rank 0, around its preparation: what ends it ends the other ranks with the same line."""
        try:
            yield
        except BaseException as error:
            known = error if isinstance(error, UserError) else None
            text = f"rank 0 failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            failed = Answer(
                self.nonce,
                socket.gethostname(),
                "",
                [],
                text if known is None else known.message,
                "Look at rank 0's output." if known is None else known.fix,
                1 if known is None else known.exit_code,
            )
            self._dismiss(failed)
            raise

    def admit(self, folder: Path, overrides: Sequence[str]) -> None:
        """On rank 0: returns when every rank has read the job that was prepared with this nonce.

        Raises:
            SetupError: a rank has not come in time, cannot read the job, or was given other overrides.
        """
        host = socket.gethostname()
        answer = Answer(self.nonce, host, str(folder.absolute()), list(overrides))
        others = range(1, self._here.num_ranks)
        wait = _Wait(self._here, CONNECT_S)
        while self._answer(answer, READ) < len(others):
            if wait.is_due():
                missing = [rank for rank in others if not self._store.check([self._report(rank)])]
                wait.look(f"for {_name_missing(missing, self._here.num_ranks)}", self._to_check())
            time.sleep(LOOK_S)
        for rank in others:
            refusal = json.loads(self._store.get(self._report(rank)))
            if refusal:
                raise SetupError(refusal[0], fix=refusal[1])
        self._store.set(self._key(GO), json.dumps(asdict(answer)))

    def join(self, folder: Path, overrides: Sequence[str]) -> None:
        """On every other rank: returns when rank 0 has prepared the job and all ranks have read it.

        Raises:
            UserError: why rank 0 has no job, or a rank cannot take part; the exit code is rank 0's.
        """
        request = self._store.add(REQUESTS, 1)
        what = f"for rank 0 at {self._here.address} to prepare {folder}"
        answer = self._wait_for(f"answer/{request}", what, PREPARED_S)
        self.nonce = answer.nonce
        if not answer.message:
            refusal = self._refusal(answer, folder, overrides)
            self._store.set(self._report(self._here.rank), json.dumps(refusal))
            self._store.add(self._key(READ), 1)
            answer = self._wait_for(self._key(GO), "for the other ranks", CONNECT_S + STORAGE_S)
        self._store.add(self._key(LEFT), 1)
        if answer.message:
            raise UserError(answer.message, fix=answer.fix, exit_code=answer.exit_code)

    def _answer(self, answer: Answer, heard: str) -> int:
        """Answers all requests since the last call; returns how many ranks have set ``heard``."""
        total = self._store.add(REQUESTS, 0)
        for request in range(self._num_answered + 1, total + 1):
            self._store.set(f"answer/{request}", json.dumps(asdict(answer)))
        self._num_answered = total
        return int(self._store.add(self._key(heard), 0))

    def _dismiss(self, answer: Answer) -> None:
        """Gives the reason to all other ranks, and stays for a while: with this process the store may go."""
        deadline = time.monotonic() + LEAVE_S
        with suppress(dist.DistError):
            self._store.set(self._key(GO), json.dumps(asdict(answer)))
            while self._answer(answer, LEFT) < self._here.num_ranks - 1:
                if time.monotonic() > deadline:
                    return
                time.sleep(LOOK_S)

    def _refusal(self, answer: Answer, folder: Path, overrides: Sequence[str]) -> list[str]:
        """Message and fix where this rank cannot take part in rank 0's job; else nothing."""
        theirs = f"rank 0 on {answer.host}"
        if list(overrides) != answer.overrides:
            mine, other = (" ".join(words) or "none" for words in (overrides, answer.overrides))
            message = f"{self._here} was started with the overrides {mine}, {theirs} with {other}"
            return [message, "Start every rank by the same command."]
        deadline = time.monotonic() + STORAGE_S
        while launch_of(folder) != answer.nonce:
            if time.monotonic() > deadline:
                message = f"{self._here} does not find in {folder.absolute()} what {theirs} prepared in {answer.folder}"
                fix = "Put --out on storage that all nodes share, and start every rank by the same command in the same folder."
                return [message, fix]
            time.sleep(LOOK_S)
        return []

    def _wait_for(self, key: str, what: str, limit_s: float) -> Answer:
        wait = _Wait(self._here, limit_s)
        while True:
            try:
                if self._store.check([key]):
                    return Answer(**json.loads(self._store.get(key)))
            except dist.DistError as error:
                raise UserError(
                    f"{self._here} waited {what}: its store is gone",
                    fix="Look at rank 0's output; the same command starts again.",
                    exit_code=LOST_EXIT_CODE,
                ) from error
            wait.look(what, "rank 0's output has more")
            time.sleep(wait.pause_s())

    def _to_check(self) -> str:
        store = f"MASTER_ADDR={self._here.address} MASTER_PORT={self._here.port}"
        size = f"WORLD_SIZE={self._here.num_ranks}"
        return f"check that each of them was started, with {size} {store} and the same command"

    def _key(self, name: str) -> str:
        return f"{self.nonce}/{name}"

    def _report(self, rank: int) -> str:
        return self._key(f"report/{rank}")


def _name_missing(missing: Sequence[int], num_ranks: int) -> str:
    """How many ranks are missing and which; and on which nodes, where ranks are dealt out to nodes in their order."""
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    text = f"{len(missing)} of {num_ranks} ranks: {', '.join(map(str, missing[:NAMED]))}{more}"
    size = ranks_on_node(os.environ)
    if size is None or size == num_ranks:
        return text
    nodes = sorted({rank // size for rank in missing})
    more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
    return f"{text} (node {', '.join(map(str, nodes[:NAMED]))}{more}?)"


class _Wait:
    """A wait with an end, which prints what for at times; of a node's ranks the first one does."""

    def __init__(self, here: LaunchedRank, limit_s: float) -> None:
        self._here, self._limit_s = here, limit_s
        self._began = self._last = time.monotonic()

    def pause_s(self) -> float:
        """Returns the seconds until the next try: few at first, and never so many ranks at once that it is work."""
        return min(LONGEST_PAUSE_S, LOOK_S + (time.monotonic() - self._began) / 10)

    def is_due(self) -> bool:
        """Returns whether ``look`` has something to print or to raise."""
        return time.monotonic() - self._last >= min(SAY_EVERY_S, self._limit_s)

    def look(self, what: str, check: str) -> None:
        """Prints what is waited for and what to check, when it is time.

        Raises:
            SetupError: the time is over.
        """
        if not self.is_due():
            return
        self._last = time.monotonic()
        waited = self._last - self._began
        if waited >= self._limit_s:
            raise SetupError(
                f"{self._here} waited {what}, {waited:.0f} s: no longer",
                fix="Look at the output of the ranks that are missing, and at MASTER_ADDR and MASTER_PORT of each.",
            )
        if os.environ.get("LOCAL_RANK", "0") == "0":
            sys.stderr.write(f"{self._here} waits {what}, {waited:.0f} s; {check}\n")
