"""One random bit of the newest checkpoint is flipped: it must be seen, and the one before it used.

A bit of the file ``latest`` changes nothing: checkpoints are found by their manifests.
"""

import argparse
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from tests.chaos import saves


def flip(path: Path, draw: random.Random) -> int:
    """Flips a random bit of a file; the byte it is in."""
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return place


def run(arguments: list[str]) -> bool:
    """Flips ``--count`` bits, each in a fresh copy, all files in turn."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos bitflips")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    draw, counts, broken = random.Random(options.seed), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        whole, folder = Path(scratch) / "whole", Path(scratch) / "case"
        for step in (10, 20):
            saves.save(whole, step)
        newest = whole / (whole / "latest").read_text().strip()
        files = [*sorted(newest.iterdir()), whole / "latest"]
        for case in range(options.count):
            file = files[case % len(files)].relative_to(whole)
            shutil.copytree(whole, folder)
            place = flip(folder / file, draw)
            told: list[str] = []
            expected = 20 if file.name == "latest" else 10
            try:
                step = saves.loaded_step(folder, told)
                assert step == expected, f"step {step} is loaded"
                assert bool(told) == (expected == 10), told
                counts[file.name] += 1
            except Exception as error:
                broken.append(f"{file}, byte {place}: {error}")
            shutil.rmtree(folder)
    print(f"bitflips: {options.count} bits flipped, {len(broken)} not seen or not survived")
    for name, count in sorted(counts.items()):
        print(f"  {count:5} in {name}")
    for line in broken[:10]:
        print(f"  {line}")
    return bool(broken)
