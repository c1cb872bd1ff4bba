"""Damaged recipes, weights, manifests and tar files: each gives a result or a clear error, in no time, and runs nothing.

Of each case are taken: what it raised (anything but a ``UserError`` with a message is a bug), the
processor's time, the growth of this process's peak memory, and whether something was started,
imported from a file of the case, or connected to.
"""

import argparse
import logging
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from distill.errors import UserError
from tests.chaos.targets import Target, settle, targets

MOST_S, MOST_BYTES = 1.0, 200e6
HANGS_S = 30.0  # of the clock on the wall
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
STARTS += ("pickle.find_class", "os.startfile", "ctypes.dlopen")


class Hangs(BaseException):
    """A case that did not end; no handler of the product catches it."""


class Watch:
    """Notes what a case starts, by the interpreter's own audit."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.is_on = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_on and event in STARTS:
            self.events.append(f"{event} {arguments!r}"[:200])


def run(arguments: list[str]) -> bool:
    """Tries ``--count`` files, the kinds in turn."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos fuzz")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", default="")
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    options = parser.parse_args(arguments)
    settle()
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, _stop)
    watch, counts, broken = Watch(), Counter[str](), list[str]()
    most_s, most_bytes = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        kinds = [t for t in targets(Path(scratch)) if options.target in ("", t.name)]
        for number in range(options.first, options.first + options.count):
            target = kinds[number % len(kinds)]
            draw = Random(f"{options.seed}/{target.name}/{number}")
            with tempfile.TemporaryDirectory() as folder:
                outcome, seconds, grown, problem = _try(target, Path(folder), draw, watch)
            counts[f"{target.name} {outcome}"] += 1
            if number >= options.first + len(kinds):  # the first of a kind imports what it needs
                most_s[target.name] = max(most_s[target.name], seconds)
                most_bytes[target.name] = max(most_bytes[target.name], grown)
                problem = problem or _excess(seconds, grown)
            if problem:
                broken.append(f"{target.name} case {number}: {problem}")
    _print(options.count, options.seed, kinds, counts, most_s, most_bytes, broken)
    return bool(broken)


def _try(target: Target, folder: Path, draw: Random, watch: Watch) -> tuple[str, float, int, str]:
    """What a case came to (``result``, ``error`` or ``bug``), seconds, bytes, and what is wrong with that."""
    path = target.damage(folder, draw)
    outcome, problem = "result", ""
    before, started = _reset_peak(), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, HANGS_S)
    watch.events, watch.is_on = [], True
    try:
        target.read(path)
    except UserError as error:
        outcome = "error"
        if not error.message.strip() or ("\n" in error.message and target.name != "recipe"):
            problem = f"not one clear line: {error.message[:200]!r}"
    except (Exception, Hangs) as error:
        outcome = "bug"
        last = traceback.extract_tb(error.__traceback__)[-1]
        told = str(error)[:200]
        problem = f"{type(error).__name__}: {told} at {Path(last.filename).name}:{last.lineno}"
    finally:
        watch.is_on = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, grown = time.process_time() - started, max(0, _peak() - before)
    if watch.events:
        outcome, problem = "bug", f"it started something: {watch.events[0]}"
    return outcome, seconds, grown, problem


def _excess(seconds: float, grown: int) -> str:
    if seconds > MOST_S:
        return f"took {seconds:.2f} s, more than {MOST_S:g}"
    if grown > MOST_BYTES:
        return f"took {grown / 1e6:.0f} MB, more than {MOST_BYTES / 1e6:.0f}"
    return ""


def _stop(number: int, frame: FrameType | None) -> None:
    raise Hangs(f"did not end within {HANGS_S:g} s")


def _reset_peak() -> int:
    """Bytes this process holds now, from which its peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the system does not tell the peak")


def _print(
    count: int,
    seed: int,
    kinds: list[Target],
    counts: Counter[str],
    most_s: Counter[str],
    most_bytes: Counter[str],
    broken: list[str],
) -> None:
    print(f"fuzz: {count} damaged files, seed {seed}, {len(broken)} broke a promise")
    for name in (target.name for target in kinds):
        ends = ", ".join(f"{counts[f'{name} {end}']} {end}s" for end in ("result", "error", "bug"))
        print(f"  {name:9} {ends}; at most {most_s[name]:.2f} s, {most_bytes[name] / 1e6:.0f} MB")
    for line in broken[:40]:
        print(f"  {line}")
