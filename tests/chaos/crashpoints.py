"""A save that ends at each of its operations on the disk, as a killed process or as a power cut.

A child saves step 30 into a folder that holds steps 10 and 20, and dies at its n-th call that
opens, writes, syncs, renames, makes or removes; a write that dies is half done. For a power cut
what was not synced by then is undone, each thing with probability one half: bytes of files, new
names, renames. After that the newest checkpoint and the one that ``latest`` names must be step 20
or step 30, whole, and the next save must succeed.
"""

import argparse
import os
import random
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from distill.runfolder.manifest import clean
from tests.chaos import saves

BEFORE, DURING, AFTER = (10, 20), 30, 40
DIED, WHOLE = 77, 0
NAMES = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


class PowerCut:
    """What the disk would lose now: bytes, names and renames that were not synced yet."""

    def __init__(self) -> None:
        self.dirty: set[str] = set()  # files with bytes that were not synced
        self.names: list[str] = []  # made, and their folder not synced since
        self.renames: list[tuple[str, str, bytes | None]] = []  # and what the target held

    def note(self, name: str, path: str, target: str) -> None:
        """Before an operation is done."""
        if name == "write":
            self.dirty.add(path)
        elif name == "fsync":
            self.dirty.discard(path)
            self.names = [each for each in self.names if str(Path(each).parent) != path]
            self.renames = [each for each in self.renames if str(Path(each[1]).parent) != path]
        elif name in ("open", "mkdir") and not os.path.lexists(path):
            self.names.append(path)
        elif name in ("rename", "replace"):
            held = Path(target).read_bytes() if Path(target).is_file() else None
            self.renames.append((path, target, held))
            self.dirty = {moved(each, path, target) for each in self.dirty}
            self.names = [moved(each, path, target) for each in self.names if each != path]

    def strike(self, draw: random.Random) -> None:
        """Loses each with probability one half; renames from the last one back."""
        for path in sorted(self.dirty):
            if Path(path).is_file() and draw.random() < 0.5:
                os.truncate(path, draw.randint(0, Path(path).stat().st_size))
        for path in self.names:
            if os.path.lexists(path) and draw.random() < 0.5:
                shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
        while self.renames and draw.random() < 0.5:
            source, target, held = self.renames.pop()
            if os.path.lexists(target):
                shutil.move(target, source)
            if held is not None:
                Path(target).write_bytes(held)


def moved(path: str, source: str, target: str) -> str:
    return target + path[len(source) :] if f"{path}/".startswith(f"{source}/") else path


class Reaper:
    """Stands before the operations of ``os`` and ends the process at the n-th; 0 only counts."""

    def __init__(self, folder: Path, at: int, draw: random.Random | None) -> None:
        self.count, self._at, self._draw = 0, at, draw
        self._folder, self._lock, self._cut = str(folder), threading.RLock(), PowerCut()
        self._true = {name: getattr(os, name) for name in NAMES}
        for name, function in self._true.items():
            setattr(os, name, partial(self._call, name, function))

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        path = self._path(args[0], cast("int | None", kwargs.get("dir_fd")))
        if not path.startswith(self._folder):
            return function(*args, **kwargs)
        with self._lock:
            self.count += 1
            target = os.fspath(args[1]) if name in ("rename", "replace") else ""
            if self.count == self._at:
                if name == "write":
                    self._cut.note(name, path, target)
                    function(args[0], args[1][: len(args[1]) // 2])
                self._die()
            self._cut.note(name, path, target)
            return function(*args, **kwargs)

    def _path(self, first: Any, folder: int | None) -> str:
        if isinstance(first, int):
            return str(Path(f"/proc/self/fd/{first}").readlink())
        path = os.fspath(first)
        return path if folder is None else str(Path(f"/proc/self/fd/{folder}").readlink() / path)

    def _die(self) -> None:
        for name, function in self._true.items():
            setattr(os, name, function)
        if self._draw is not None:
            self._cut.strike(self._draw)
        os._exit(DIED)


def save_and_die(folder: Path, keep: int, at: int, draw: random.Random | None) -> int:
    """The number of operations of a save of step 30, when ``at`` is 0; else how the child that dies at one ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            reaper = Reaper(folder, at, draw)
            saves.save(folder, DURING, keep)
            code = reaper.count if at == 0 else WHOLE
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepare(folder: Path, keep: int) -> None:
    for step in BEFORE:
        assert saves.save(folder, step, keep).saved_steps == [step]


def check(folder: Path, keep: int) -> int:
    """The step that a run would go on from; raises AssertionError when a promise is broken."""
    pointed = saves.pointed_step(folder)
    assert pointed in (BEFORE[-1], DURING), f"latest names step {pointed}"
    clean(folder)
    told: list[str] = []
    step = saves.loaded_step(folder, told)
    assert step in (BEFORE[-1], DURING) and step >= pointed, f"step {step} is loaded"
    assert not told, told
    assert saves.save(folder, AFTER, keep).saved_steps == [AFTER], "the next save fails"
    assert saves.loaded_step(folder, told) == AFTER
    return step


def run(arguments: list[str]) -> bool:
    """Dies ``--count`` times; every operation of a save at least once where the count allows."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos crashpoints")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    draw, counts, broken = random.Random(options.seed), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        for keep in (1, 2):
            prepare(Path(scratch) / f"keep{keep}", keep)
        num_operations = 0
        for case in range(options.count):
            keep, has_cut = case % 4 // 2 + 1, bool(case % 2)
            folder = Path(scratch).resolve() / f"case{case}"
            shutil.copytree(Path(scratch) / f"keep{keep}", folder)
            if case == 0:
                shutil.copytree(folder, folder.with_name("whole"))
                num_operations = save_and_die(folder.with_name("whole"), keep, 0, None)
                order = spread(num_operations, options.count, draw)
            at = order[case]
            ended = save_and_die(folder, keep, at, draw if has_cut else None)
            try:
                assert ended in (DIED, WHOLE), f"the child ended with {ended}"
                step = check(folder, keep)
                counts["power cut" if has_cut else "killed"] += 1
                counts["new" if step == DURING else "old"] += 1
            except Exception as error:
                broken.append(f"case {case}, operation {at}, keep {keep}, cut {has_cut}: {error}")
            shutil.rmtree(folder)
    print(f"crashpoints: {options.count} saves ended at one of their {num_operations} operations")
    print(f"  {counts['killed']} killed, {counts['power cut']} power cuts")
    print(
        f"  old state loads {counts['old']}, new state loads {counts['new']}, {len(broken)} broken"
    )
    for line in broken[:10]:
        print(f"  {line}")
    return bool(broken)


def spread(num_operations: int, count: int, draw: random.Random) -> list[int]:
    """Operations to die at: evenly over all of them, those beyond one round drawn at random."""
    even = [1 + case * num_operations // count for case in range(count)]
    if count > num_operations:
        extra = count - num_operations
        even = [
            *range(1, num_operations + 1),
            *(draw.randint(1, num_operations) for _ in range(extra)),
        ]
    draw.shuffle(even)
    return even
