"""Errors of the system, by what they mean, and what happens to each."""

import errno
import os
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from distill.errors import StorageError
from distill.listing import storage
from distill.listing.locations import Kind, Location, Reader
from distill.listing.sources import list_source
from distill.listing.storage import Storage, is_of_file, read_file

STORAGE = ("EIO", "ESTALE", "ETIMEDOUT", "EMFILE", "ENFILE", "EAGAIN", "ENOMEM", "EREMOTEIO")
STORAGE += ("ECONNRESET", "EHOSTDOWN", "ENOTCONN", "ENODEV", "ESHUTDOWN")
FILE = ("ENOENT", "EISDIR", "ENAMETOOLONG", "ENOTDIR", "ELOOP")


def error_of(name: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that are counted and not waited for."""
    pauses: list[float] = []

    class Event:
        is_over = False

        def set(self) -> None:
            self.is_over = True

        def is_set(self) -> bool:
            return self.is_over

        def wait(self, pause_s: float) -> None:
            pauses.append(pause_s)

    monkeypatch.setattr("threading.Event", Event)
    return pauses


@pytest.mark.parametrize("name", STORAGE)
def test_storage__what_is_its_is_tried_again(name: str, quick: list[float]) -> None:
    errors = [error_of(name)] * 3

    def attempt() -> bytes:
        if errors:
            raise errors.pop()
        return b"picture"

    assert Storage().read("/data/1.png", attempt) == b"picture"
    assert quick == [0.1, 0.2, 0.4]


@pytest.mark.parametrize("name", FILE)
def test_storage__what_is_the_files_is_an_error_at_once(name: str, quick: list[float]) -> None:
    def attempt() -> bytes:
        raise error_of(name)

    with pytest.raises(OSError, match=re.escape(os.strerror(getattr(errno, name)))):
        Storage().read("/data/1.png", attempt)
    assert quick == []


def test_storage__gives_up_after_five_minutes_and_then_for_every_thread(quick: list[float]) -> None:
    lines, marks, made = list[str](), list[str](), Storage
    storage_ = made(lines.append, marks.append)

    def attempt() -> bytes:
        raise error_of("ESTALE")

    text = r"/data/1.png: the storage does not give it \(Stale file handle\), tried again for 300 s"
    with pytest.raises(StorageError, match=text) as caught:
        storage_.read("/data/1.png", attempt)
    assert caught.value.exit_code == 4 and caught.value.fix
    assert max(quick) == storage.LONGEST_PAUSE_S and sum(quick) == pytest.approx(300.0, abs=0.1)
    assert [line.rpartition(" ")[0].rpartition(", ")[2] for line in lines] == [
        "3", "6", "13", "26", "51", "111", "231",
    ]  # fmt: skip
    assert lines[0] == "waiting for storage: /data/1.png (Stale file handle), 3 s"
    assert marks[-1].startswith("waiting for storage: /data/1.png")
    quick.clear()
    with pytest.raises(StorageError):
        storage_.read("/data/2.png", attempt)
    assert quick == []


def test_storage__that_answers_again_is_reported_where_its_absence_was() -> None:
    for refusals, reported in ((2, 0), (6, 2)):
        lines, marks = list[str](), list[str]()
        errors = [error_of("EIO")] * refusals

        def attempt(errors: list[OSError] = errors) -> bytes:
            if errors:
                raise errors.pop()
            return b""

        Storage(lines.append, marks.append).read("/data/1.png", attempt)
        assert len(lines) == reported and marks[-1] == "" and len(marks) == refusals + 1
    assert lines[-1] == "storage answers again: /data/1.png, after 3 s"


def test_is_of_file__denied_rights_are_the_files_where_its_mode_denies_them(tmp_path: Path) -> None:
    path = tmp_path / "closed" / "1.png"
    path.parent.mkdir()
    path.touch()
    denied = PermissionError(errno.EACCES, "Permission denied")
    assert not is_of_file(denied, str(path))  # a ticket that has expired
    path.chmod(0o000)
    assert is_of_file(denied, str(path))
    assert is_of_file(OSError("ends before it should"), str(path))
    assert not is_of_file(denied, str(tmp_path / "none" / "1.png"))


def test_read_file__gives_regular_files_and_waits_for_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    os.mkfifo(tmp_path / "pipe")
    assert read_file(str(tmp_path / "file")) == b"x" * 100_000
    with pytest.raises(OSError, match="no regular file"):
        read_file(str(tmp_path / "pipe"))
    with pytest.raises(IsADirectoryError):
        read_file(str(tmp_path))


def test_read_file__an_error_behind_the_first_bytes_is_no_short_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    pread, errors = os.pread, [error_of("EIO")]

    def stutter(descriptor: int, length: int, offset: int) -> bytes:
        if offset and errors:
            raise errors.pop()
        return pread(descriptor, min(length, 4), offset)

    monkeypatch.setattr("os.pread", stutter)
    location = Location.of(tmp_path / "file")
    assert Reader().read(location).tobytes() == b"0123456789" and not errors


def test_list_source__a_folder_that_storage_refuses_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    scandir, errors = os.scandir, [error_of("EIO"), error_of("EMFILE")]

    def stutter(path: str) -> object:
        if str(path).endswith("dog") and errors:
            raise errors.pop()
        return scandir(path)

    monkeypatch.setattr("os.scandir", stutter)
    assert len(list_source(tmp_path)) == 2 and not errors


def test_reader__a_row_of_a_parquet_file_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"one", b"two"]}), path)
    made, errors = pyarrow.parquet.ParquetFile, [error_of("EIO")]

    def stutter(name: str) -> object:
        if errors:
            raise errors.pop()
        return made(name)

    monkeypatch.setattr("pyarrow.parquet.ParquetFile", stutter)
    row = Location(Kind.PARQUET, str(path), "0/1", 0, 1)
    assert Reader().read(row).tobytes() == b"two" and not errors
    errors.append(error_of("ETIMEDOUT"))
    assert len(list_source(path)) == 2 and not errors
