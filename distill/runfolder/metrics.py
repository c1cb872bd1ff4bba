"""``metrics/NAME.jsonl``: a row of numbers per network and logging interval (``distill.runfolder.status`` has the rest)."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from distill.errors import UserError
from distill.runfolder.events import Event, note
from distill.runfolder.files import replaced
from distill.runfolder.status import without_nonfinite


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
        self._end = self.path.read_bytes().rfind(b"\n") + 1
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
    """One network's history, read a little further at each ``poll``; ``rows`` holds all of it."""

    def __init__(self, run_folder: Path, network: str) -> None:
        """Name the file; it need not exist yet."""
        self.path = metrics_path(run_folder, network)
        self.rows: list[MetricsRow] = []
        self._offset = 0
        self._inode = -1

    def poll(self) -> list[MetricsRow]:
        """Rows that were completed since the last poll; starts over when a resume rewrote the file.

        A last line without its newline is left for the next poll.

        Raises:
            UserError: a complete line is not a row; names file and line.
        """
        try:
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_ino != self._inode or facts.st_size < self._offset:
                    self.rows, self._offset, self._inode = [], 0, facts.st_ino
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data[: data.rfind(b"\n") + 1]
        num_known = len(self.rows)
        fresh = [
            _parse_row(line, self.path, num_known + line_number)
            for line_number, line in enumerate(complete.splitlines(), start=1)
        ]
        self.rows.extend(fresh)
        self._offset += len(complete)
        return fresh


def read_rows(run_folder: Path, network: str) -> list[MetricsRow]:
    """The history of one network so far; empty when it has none."""
    reader = MetricsReader(run_folder, network)
    return reader.poll()


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
    path = metrics_path(run_folder, network)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    good = []
    for line_number, line in enumerate(lines, start=1):
        with suppress(UserError):
            row = _parse_row(line, path, line_number)
            if (order[row.phase], row.step) <= (order[phase], step):
                good.append(line)
    if len(good) < len(lines):
        with replaced(path) as aside:
            aside.write_bytes(b"".join(good))
    return len(lines) - len(good)


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
