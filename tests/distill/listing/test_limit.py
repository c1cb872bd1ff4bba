"""A picture that blocks costs its limit, and no thread that stands in it keeps a process."""

import logging
import os
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from distill.errors import StorageError
from distill.listing.limit import BLOCKED_IN_A_ROW, BlockedError, LimitedCalls, in_order
from distill.listing.locations import Location
from distill.protocols.images import Scored, read_split
from tests.support.pictures import picture

ROOT = Path(__file__).parents[3]
BLOCKING = """
import signal, sys, torch
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without
from distill.protocols.images import Scored, read_split
from distill.listing import locations

def read_file(path):
    if Path(path).is_fifo():
        print("blocks", flush=True)
    return Path(path).read_bytes()

locations.read_file = read_file
found = [locations.Location.of(Path(path)) for path in sys.argv[2:]]
read = read_split(Scored(found, torch.zeros(len(found), dtype=torch.int64)), 16, None, limit_s=float(sys.argv[1]))
print([(each.sample, each.reason) for each in read.left_out], flush=True)
"""


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Three pictures, of which the second is a pipe that nothing writes to."""
    made = [tmp_path / f"{number}.png" for number in range(3)]
    for number in (0, 2):
        Image.fromarray(picture(number)).save(made[number])
    os.mkfifo(made[1])
    return made


def start(paths: list[Path], limit_s: float) -> "subprocess.Popen[str]":
    """A process that reads the pictures as scoring does, by calls that block."""
    command = [sys.executable, "-c", BLOCKING, str(limit_s), *map(str, paths)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_read_split__a_pipe_is_left_out_at_once(
    paths: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    split = Scored([Location.of(path) for path in paths], torch.arange(3))
    with caplog.at_level(logging.WARNING):
        read = read_split(split, 16, None)
    assert [(each.sample, each.reason) for each in read.left_out] == [
        (str(paths[1]), "no regular file")
    ]
    assert read.split.labels.tolist() == [0, 2] and len(read.pixels) == 2
    assert f"{paths[1]}: left out of the scores, cannot be used (no regular file)" in caplog.text


@pytest.mark.slow
def test_read_split__what_blocks_is_left_out_and_the_process_ends(paths: list[Path]) -> None:
    process = start(paths, 0.5)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert printed.splitlines()[1] == f"[('{paths[1]}', 'no answer within 0.5 s')]"
    assert f"{paths[1]}: left out of the scores, cannot be used (no answer" in errors


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_read_split__signals_are_heard_while_a_picture_blocks(
    signum: signal.Signals, paths: list[Path]
) -> None:
    process = start(paths, 3600.0)
    assert process.stdout is not None and process.stdout.readline() == "blocks\n"
    process.send_signal(signum)
    printed, errors = process.communicate(timeout=60)
    assert printed == "" and errors.strip().endswith("KeyboardInterrupt") == (
        signum == signal.SIGINT
    )
    # CPython forgets that a KeyboardInterrupt ended it where code compiled from text runs at its exit
    assert process.returncode == -signum or (process.returncode, signum) == (1, signal.SIGINT)


def test_run__gives_what_a_call_gives_or_raises() -> None:
    calls = LimitedCalls(60.0)
    assert calls.run(lambda: 7, "a") == 7
    for _ in range(2):
        with pytest.raises(KeyError, match="x"):
            calls.run(lambda: {}["x"], "a")
    assert calls.run(threading.get_ident, "a") == calls.run(threading.get_ident, "b")


def test_run__its_idle_threads_end_with_it() -> None:
    before = set(threading.enumerate())
    calls = LimitedCalls(60.0)
    calls.run(partial(id, calls), "a")  # a reader's calls lead to the reader
    (idle,) = set(threading.enumerate()) - before
    del calls
    idle.join(20.0)
    assert not idle.is_alive()


def test_run__storage_that_answers_for_no_file_ends_it() -> None:
    calls, never = LimitedCalls(0.01), threading.Event()
    for _ in range(BLOCKED_IN_A_ROW - 1):
        with pytest.raises(BlockedError, match=r"^no answer within 0\.01 s$"):
            calls.run(never.wait, "a")
    with pytest.raises(StorageError, match=r"last\.png: no answer within .*, as 7 files before it"):
        calls.run(never.wait, "last.png")
    never.set()


def test_in_order__results_come_in_order_and_an_error_ends_the_rest() -> None:
    assert list(in_order(lambda item: item * 2, range(100), 3)) == list(range(0, 200, 2))
    assert list(in_order(str, [], 3)) == []
    started = []

    def work(item: int) -> int:
        started.append(item)
        if item == 1:
            raise KeyError(item)
        return item

    with pytest.raises(KeyError):
        list(in_order(work, range(100_000), 1))
    assert len(started) < 100_000
