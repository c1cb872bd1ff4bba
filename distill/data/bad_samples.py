"""Samples that could not be used: each is named once in ``bad_samples.jsonl``, and too many of them end the run.

All ranks of a machine append to one file under a lock, and read what others wrote before they add a
name. A file system without locks may give a name twice, nothing worse.
"""

import fcntl
import json
from pathlib import Path

from distill.errors import DataError

FILE = "bad_samples.jsonl"
ALWAYS_ALLOWED = 8  # draws; a small sample is no estimate of a rate


class BadSamples:
    """Names bad samples and keeps their rate; one per loader, on every rank.

    Args:
        file: where names go; None to keep them in memory only.
        max_fraction: of all draws; above it the run stops.
    """

    def __init__(self, file: Path | None, max_fraction: float) -> None:
        self._file, self._max_fraction = file, max_fraction
        self._known: set[str] = set()
        self._read_bytes = 0
        self._num_draws = self._num_bad = 0

    def add_draws(self, count: int) -> None:
        """Counts samples that were requested."""
        self._num_draws += count

    def add(self, name: str, reason: str) -> None:
        """Counts a draw that met a bad sample, and names the sample if no rank has.

        Raises:
            DataError: the rate is above the allowed one.
        """
        self._num_bad += 1
        if name not in self._known:
            self._known.add(name)
            if self._file is not None:
                self._write(self._file, name, reason)
        if self._num_bad > max(ALWAYS_ALLOWED, self._max_fraction * self._num_draws):
            listed = "" if self._file is None else f" (all are in {self._file})"
            raise DataError(
                f"{name}: cannot be used ({reason}); {self._num_bad:,} of {self._num_draws:,} draws were bad{listed}, "
                f"more than data.max_bad_fraction = {self._max_fraction:g} allows",
                fix="Repair or remove the files, or raise data.max_bad_fraction; the same command goes on from the last checkpoint.",
            )

    def _write(self, path: Path, name: str, reason: str) -> None:
        line = json.dumps({"sample": name, "reason": reason}) + "\n"
        with path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(self._read_bytes)
            others = {json.loads(row)["sample"] for row in file.read().splitlines()}
            self._known |= others
            if name not in others:
                file.write(line.encode())
            self._read_bytes = file.tell()


def count_bad(path: Path) -> int:
    """Samples named so far in a run."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0
