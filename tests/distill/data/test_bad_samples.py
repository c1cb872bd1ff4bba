"""The diary of bad samples ends no run: torn lines, no locks, no room."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from distill.data.bad_samples import FILE, BadSamples, count_bad
from distill.runfolder.events import read_events


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE


def names_in(path: Path) -> list[str]:
    found = []
    for line in path.read_text().splitlines():
        if line.endswith("}"):
            found.append(json.loads(line)["sample"])
    return found


def test_add__a_torn_last_line_is_passed_over(path: Path) -> None:
    path.write_text('{"sample": "a", "reason": "x"}\n{"sample": "b", "re')
    bad = BadSamples(path, 1.0)
    for name in ("a", "b", "c"):
        bad.add(name, "empty file")
    assert names_in(path) == ["a", "b", "c"] and count_bad(path) == 4
    assert read_events(path.parent) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EIO, errno.EAGAIN])
def test_add__without_a_lock_names_are_written_all_the_same(
    number: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr("distill.data.bad_samples.LOCK_PAUSE_S", 0.0)
    one, other = BadSamples(path, 1.0), BadSamples(path, 1.0)
    one.add("a", "x")
    other.add("a", "x")
    other.add("b", "x")
    one.add("b", "x")
    assert names_in(path) == ["a", "b"] and read_events(path.parent) == []


def test_add__a_full_disk_is_one_event_and_what_came_before_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = BadSamples(path, 1.0)
    bad.add("a", "x")
    opened = Path.open

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self == path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    for name in ("b", "c"):
        bad.add(name, "x")
    assert count_bad(path) == 0  # it cannot be read either
    monkeypatch.undo()
    (event,) = read_events(path.parent)
    assert event.text.startswith(f"{os.uname().nodename}: {path}: not every bad sample is named")
    assert "(No space left on device)" in event.text
    bad.add("d", "x")
    assert names_in(path) == ["a", "d"]


def test_count_bad__of_no_file_is_none(path: Path) -> None:
    assert count_bad(path) == 0
