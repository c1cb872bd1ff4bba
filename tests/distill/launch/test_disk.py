"""What the launcher prints about the disk and about saves that failed, and how saves reach it."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from distill.launch.disk import FULL_BYTES, LONGEST, SAY_EVERY_S, DiskWatch, receive, send
from distill.runfolder.status import StatusFile
from tests.support.status import STATUS

FAILURE = "checkpoint base-20 was not saved: No space left on device"


class Disk:
    """A watched disk, its clock, and what was printed about it."""

    def __init__(self, folder: Path) -> None:
        self.now, self.free, self.lines = 0.0, 10**9, list[str]()
        clock, free = (lambda: self.now), (lambda _: self.free)
        self.watch = DiskWatch(folder, self.lines.append, clock=clock, free_bytes=free)

    def look(self, after_s: float) -> list[str]:
        """The lines of a time in which it looks four times a second."""
        self.lines.clear()
        for _ in range(int(4 * after_s)):
            self.now += 0.25
            self.watch.look()
        return list(self.lines)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path)


def test_look__a_full_disk_is_a_line_at_once_and_every_few_minutes(
    disk: Disk, tmp_path: Path
) -> None:
    assert disk.look(60.0) == []
    disk.free = 0
    (line,) = disk.look(6.0)
    assert line.startswith(f"{tmp_path}: the disk is full, 0 bytes are free; 0 saves failed since")
    for _ in range(3):
        disk.watch.take(FAILURE)
        assert disk.look(60.0) == []
    (line,) = disk.look(SAY_EVERY_S - 180.0)
    assert f"3 saves failed since the last good one ({FAILURE})" in line and "make room" in line
    disk.free = FULL_BYTES
    disk.watch.take("")
    assert disk.look(2 * SAY_EVERY_S) == []
    disk.free = 0
    assert len(disk.look(6.0)) == 1


def test_look__a_failed_save_that_the_status_shows_is_repeated_and_another_printed(
    disk: Disk, tmp_path: Path
) -> None:
    StatusFile(tmp_path).write(replace(STATUS, message=FAILURE))
    disk.watch.take(FAILURE)
    assert disk.look(60.0) == []
    assert len(disk.look(SAY_EVERY_S)) == 1
    disk.watch.take("")
    assert disk.look(10.0) == []
    disk.watch.take(f"{FAILURE} again")  # a quota: bytes are free, and no status could be written
    (line,) = disk.look(1.0)
    assert "nothing is saved, 1,000,000,000 bytes are free; 1 save failed" in line


def test_look__a_folder_that_is_gone_is_not_its_concern(tmp_path: Path) -> None:
    lines = list[str]()
    watch = DiskWatch(tmp_path / "gone", lines.append)
    watch.take(FAILURE)
    watch.look()
    assert lines == []
    watch = DiskWatch(tmp_path, lines.append)  # whose disk holds more than nothing
    watch.look()
    assert lines == []


def test_send__results_arrive_in_order_and_a_launcher_that_is_gone_gets_none() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    for failure in (FAILURE, "", 2 * LONGEST * "x"):
        send(theirs, failure)
    assert receive(ours) == [FAILURE, "", LONGEST * "x"] and receive(ours) == []
    ours.close()
    send(theirs, FAILURE)
