"""``metrics/NAME.jsonl``: a row of numbers per network and logging interval (``distill.runfolder.status`` has the rest)."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, runtime_checkable

from distill.errors import UserError
from distill.runfolder.events import Event, note
from distill.runfolder.files import replaced
from distill.runfolder.status import without_nonfinite

KEPT_ROWS = 1000  # a curve has fewer pixels
BLOCK_BYTES = 2**22


@dataclass(frozen=True)
class MetricsRow:
    """One network's numbers for one logging interval.

    ``terms`` holds the unweighted loss terms by name (dino, ibot, koleo, gram); in the file they
    are flat keys beside the others. ``wait`` is the fraction of the step this network's ranks were
    idle, ``skipped`` the steps since the last line that were not applied (non-finite loss).
    """

    phase: str
    step: int
    time_unix: float
    loss: float
    terms: Mapping[str, float]
    grad_norm: float
    lr: float
    wait: float
    images_per_s: float
    skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        """The flat line for the file."""
        values = {name: value for name, value in vars(self).items() if name != "terms"}
        clashes = values.keys() & self.terms.keys()
        if clashes:
            raise ValueError(f"a loss term may not be called {sorted(clashes)[0]!r}: taken")
        return {**values, **self.terms}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "MetricsRow":
        """The row of a line; every key that is not a field is a loss term.

        Raises:
            KeyError: a field is missing.
        """
        fixed = [name for name in cls.__dataclass_fields__ if name != "terms"]
        values: dict[str, Any] = {
            name: math.nan if line[name] is None else line[name] for name in fixed
        }
        terms = {
            name: math.nan if value is None else float(value)
            for name, value in line.items()
            if name not in values
        }
        return cls(**values, terms=terms)


@runtime_checkable
class MetricSink(Protocol):
    """Takes the numbers of one network. A run that was resumed repeats the rows after its checkpoint."""

    def write(self, row: MetricsRow) -> None:
        """Takes the row of a logging interval; the training loop waits until this returns."""
        ...

    def close(self) -> None:
        """Ends the phase; there may be no further row."""
        ...


SinkFactory = Callable[[Path, str], MetricSink]
"""Makes the sink of a run folder and a network, at the start of each phase, in the process of the network's first rank."""


class MetricSinks:
    """Hands each row to several sinks. One of another package that raises gets no more rows: a run does not end for its history."""

    def __init__(self, run_folder: Path, network: str, factories: Sequence[SinkFactory]) -> None:
        """Makes the writer of ``metrics/<network>.jsonl`` and a sink of each factory."""
        self._run_folder, self._network = run_folder, network
        self._writer = MetricsWriter(run_folder, network)
        self._others = [factory(run_folder, network) for factory in factories]

    def write(self, row: MetricsRow) -> None:
        """Hands on a row."""
        self._writer.write(row)
        for sink in tuple(self._others):
            self._guard(sink, partial(sink.write, row))

    def close(self) -> None:
        """Closes all sinks."""
        self._writer.close()
        for sink in tuple(self._others):
            self._guard(sink, sink.close)

    def _guard(self, sink: MetricSink, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever code from outside raises
            self._others.remove(sink)
            text = f"the metric sink {type(sink).__name__} gets no more rows: {error}"
            note(self._run_folder, Event("failed", text, self._network))


class MetricsWriter:
    """Appends one network's rows to ``metrics/<name>.jsonl``, one complete line per write."""

    def __init__(self, run_folder: Path, network: str) -> None:
        """Open the history for appending; a last line that a crash left half written is cut."""
        self.path = metrics_path(run_folder, network)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        self._end = _end_of_lines(self.path)
        self._file.truncate(self._end)
        self._waiting = b""  # rows that a full disk did not take yet

    def write(self, row: MetricsRow) -> None:
        """Append ``row``; it is visible to readers when this returns, or once a full disk has room again."""
        self._waiting += (
            json.dumps(without_nonfinite(row.to_json()), allow_nan=False).encode() + b"\n"
        )
        try:
            written = self._file.write(self._waiting)
        except OSError:
            written = 0
        if written == len(self._waiting):
            self._end, self._waiting = self._end + written, b""
        else:
            self._file.truncate(self._end)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> "MetricsWriter":
        """The writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()


class MetricsReader:
    """One network's history, read a little further at each ``poll``.

    ``rows`` holds every row, of a long history ``KEPT_ROWS`` to twice as many that are evenly spaced, and always the last.
    """

    def __init__(self, run_folder: Path, network: str) -> None:
        """Name the file; it need not exist yet."""
        self.path = metrics_path(run_folder, network)
        self._inode = -1
        self._start_over()

    def _start_over(self) -> None:
        self._offset = self._num_lines = 0
        self._spaced: list[MetricsRow] = []
        self._every = 1  # one of so many rows is kept
        self._last: MetricsRow | None = None

    @property
    def rows(self) -> list[MetricsRow]:
        """What is known of the history, oldest first."""
        is_kept = not self._spaced or self._spaced[-1] is self._last
        return self._spaced if is_kept or self._last is None else [*self._spaced, self._last]

    def poll(self) -> None:
        """Reads rows that were completed since the last poll; starts over when a resume rewrote the file.

        A last line without its newline is left for the next poll.

        Raises:
            UserError: a complete line is not a row; names file and line.
        """
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_ino != self._inode or facts.st_size < self._offset:
                    self._start_over()
                    self._inode = facts.st_ino
                file.seek(self._offset)
                while self._take(file.read(BLOCK_BYTES)):
                    file.seek(self._offset)
        except FileNotFoundError:
            return

    def _take(self, data: bytes) -> bool:
        """Reads the complete lines of a block, and parses those that are kept; False where there are none."""
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        for index, line in enumerate(lines, start=1):
            self._num_lines += 1
            is_kept = self._num_lines % self._every == 0
            if is_kept or index == len(lines):
                self._last = _parse_row(line, self.path, self._num_lines)
            if is_kept:
                assert self._last is not None, "a row that was just parsed"
                self._spaced.append(self._last)
            if len(self._spaced) > 2 * KEPT_ROWS:
                self._spaced, self._every = self._spaced[1::2], 2 * self._every
            self._offset += len(line)
        return bool(lines)


def read_rows(run_folder: Path, network: str) -> list[MetricsRow]:
    """The history of one network so far, evenly spaced rows of a long one; empty when it has none."""
    reader = MetricsReader(run_folder, network)
    reader.poll()
    return reader.rows


def drop_after(
    run_folder: Path, network: str, *, phases: Sequence[str], phase: str, step: int
) -> int:
    """Number of lines removed from a history so that it ends at ``step`` of ``phase``.

    ``phases`` are the names in their order: rows of later phases go too, and lines that are damaged:
    a run does not stop for its history. Call before the writer is opened.

    Raises:
        ValueError: ``phase`` is not among ``phases``.
    """
    order = {name: index for index, name in enumerate(phases)}
    if phase not in order:
        raise ValueError(f"phase {phase!r} is not one of this run's phases: {', '.join(phases)}")
    path, last = metrics_path(run_folder, network), (order[phase], step)
    if not path.exists():
        return 0
    num_dropped, end, is_tail = 0, 0, True  # bytes before the first line that goes; all after it go
    with path.open("rb") as file:
        for block in _blocks(file):
            good = _until(block, order, last)
            if num_dropped:
                is_tail = is_tail and not good
            else:
                end += len(good)
                is_tail = block.startswith(good)
            num_dropped += block.count(b"\n") - good.count(b"\n") + (block[-1:] != b"\n")
        if num_dropped and is_tail:
            os.truncate(path, end)
        elif num_dropped:
            file.seek(0)
            with replaced(path) as aside, aside.open("wb") as target:
                target.writelines(_until(block, order, last) for block in _blocks(file))
    return num_dropped


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """Some complete lines at a time; what a crash left half written comes last."""
    rest = b""
    while data := file.read(BLOCK_BYTES):
        lines, newline, data = data.rpartition(b"\n")
        if newline:
            yield rest + lines + newline
            rest = b""
        rest += data
    if rest:
        yield rest


def _until(block: bytes, order: Mapping[str, int], last: tuple[int, int]) -> bytes:
    """The rows up to ``last``. Where all look as we write them none is parsed but the last: there may be millions."""
    if _looks_sound(block) and _is_until(block[block[:-1].rfind(b"\n") + 1 :], order, last):
        return block
    lines = block.splitlines(keepends=True)
    return b"".join(line for line in lines if _is_until(line, order, last))


def _looks_sound(block: bytes) -> bool:
    num_lines = block.count(b"\n")
    counts = {block.count(mark) for mark in (b'{"phase": "', b"{", b"}\n")}
    return counts == {num_lines} and b"\0" not in block and block.isascii()


def _is_until(line: bytes, order: Mapping[str, int], last: tuple[int, int]) -> bool:
    """Whether a line is a row of a step up to ``last``."""
    try:
        row = MetricsRow.from_json(json.loads(line))
    except (ValueError, KeyError, TypeError):
        return False
    return row.phase in order and (order[row.phase], row.step) <= last


def _end_of_lines(path: Path) -> int:
    """Bytes up to the end of the last complete line."""
    with path.open("rb") as file:
        stop = file.seek(0, os.SEEK_END)
        while stop > 0:
            start = max(0, stop - BLOCK_BYTES)
            file.seek(start)
            found = file.read(stop - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            stop = start
    return 0


def metrics_path(run_folder: Path, network: str) -> Path:
    """Where a network's history lies."""
    return run_folder / "metrics" / f"{network}.jsonl"


def _parse_row(line: bytes, path: Path, line_number: int) -> MetricsRow:
    try:
        return MetricsRow.from_json(json.loads(line))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}:{line_number}: not a line of metrics ({error})",
            fix="remove that line; the run itself does not need it.",
        ) from error
