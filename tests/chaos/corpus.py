"""A corpus of which a part is broken after its index was made, through the loader for one epoch; and an index too large for any other way.

Files are spoiled in five ways: cut off, empty, no image at all, another image's size, gone. Every one must be named once,
nothing else may be named, the batches stay whole, and memory must not grow with what was met.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distill.data.bad_samples import BadSamples
from distill.data.build_index import build_index
from distill.data.crops import CropSchedule, CropSpec
from distill.data.feed import Feed
from distill.data.index import ImageIndex
from distill.data.loader import Loader
from distill.data.locations import Kind
from distill.data.sampler import Pool, Sampler
from distill.listing.decode import Decoding

SPEC = CropSpec(32, (0.32, 1.0), 2, 16, (0.05, 0.32), None, 0.5, (0.1, 2.0))
BATCH, WARMUP_STEPS = 64, 20
FOLDER_FILES = 1000  # in one folder
GROWTH_LIMIT_MB, INDEX_LIMIT_MB, OPEN_LIMIT_S = 256, 100, 1.0
OPEN = """
import sys, time
from pathlib import Path
import numpy as np
from distill.data.index import ImageIndex

def rss():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1e3

before, started = rss(), time.perf_counter()
index = ImageIndex.load(Path(sys.argv[1]))
opened = time.perf_counter() - started
for image in np.random.default_rng(0).integers(0, len(index), 10_000):
    index.location(int(image)), index.hw[image]
print(opened, rss() - before, len(index))
"""


def run(arguments: list[str]) -> bool:
    """Whether a claim failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos corpus")
    parser.add_argument("--count", type=int, default=2000, help="files")
    parser.add_argument("--broken", type=float, default=0.05, help="part of them")
    parser.add_argument("--entries", type=int, default=100_000, help="of the large index")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        failed = read_epoch(Path(scratch), options.count, options.broken)
        return open_index(Path(scratch), options.entries) or failed


def read_epoch(scratch: Path, count: int, broken: float) -> bool:
    """Writes, indexes, spoils and reads the corpus; True when a claim failed."""
    files = write_files(scratch / "images", count)
    index = build_index([scratch / "images"], max_bad_fraction=0.0)
    spoiled = {str(path) for path in spoil(files, round(broken * count))}
    names = scratch / "bad_samples.jsonl"
    crops, num_steps = CropSchedule.one(SPEC), -(-count // BATCH)
    sampler = Sampler([Pool(0, len(index))], 0, [(0, BATCH)])
    feed = Feed(
        index,
        crops,
        sampler,
        BadSamples(names, 1.0),
        positions=lambda _: range(BATCH),
        stop_step=num_steps,
        decoding=Decoding(64.0, None),
    )
    cpu = torch.device("cpu")
    loader = Loader(feed, crops, max_images=BATCH, num_threads=1, device=cpu)
    started, before, whole = time.perf_counter(), 0.0, True
    for step in range(num_steps):
        if step == min(WARMUP_STEPS, num_steps - 1):
            before = memory_mb()
        batch = loader.fetch(step)
        whole = whole and batch.global_crops.shape == (BATCH, 2, 3, 32, 32)
    rate, growth = num_steps * BATCH / (time.perf_counter() - started), memory_mb() - before
    loader.close()
    told = Counter(json.loads(line)["sample"] for line in names.read_text().splitlines())
    missing, innocent = spoiled - told.keys(), told.keys() - spoiled
    twice = sum(times > 1 for times in told.values())
    print(f"corpus: {count:,} files, {len(spoiled):,} spoiled, one epoch at {rate:,.0f} images/s")
    print(
        f"  {len(told):,} named, {twice} of them twice, {len(missing)} not, {len(innocent)} others"
    )
    print(f"  memory grew by {growth:.0f} MB")
    return bool(missing or innocent or twice or not whole or growth > GROWTH_LIMIT_MB)


def write_files(folder: Path, count: int) -> list[Path]:
    """Small JPEGs, a thousand to a folder."""
    rng = np.random.default_rng(0)
    kinds = []
    for number in range(64):
        buffer = io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8))
        coarse.resize((64 + number % 8, 48)).save(buffer, "JPEG")
        kinds.append(buffer.getvalue())
    paths = []
    for number in range(count):
        path = folder / f"{number // FOLDER_FILES:03}" / f"{number:07}.jpg"
        if number % FOLDER_FILES == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(kinds[number % len(kinds)])
        paths.append(path)
    return paths


def spoil(files: list[Path], count: int) -> list[Path]:
    """Breaks some of the files, in turn in each way."""
    chosen = [files[int(i)] for i in np.random.default_rng(1).permutation(len(files))[:count]]
    other = io.BytesIO()
    Image.new("RGB", (20, 30)).save(other, "JPEG")
    for number, path in enumerate(chosen):
        way = number % 5
        if way == 4:
            path.unlink()
            continue
        whole = path.read_bytes()
        path.write_bytes((whole[: len(whole) // 2], b"", b"no image" * 40, other.getvalue())[way])
    return chosen


def open_index(scratch: Path, entries: int) -> bool:
    """Opens a large index in a process of its own and looks up ten thousand images; True when it took too much."""
    text = np.frombuffer(b"".join(b"%08d.jpg" % i for i in range(entries)), np.uint8)
    index = ImageIndex(
        hw=np.full((entries, 2), 375, np.int32),
        names=text,
        name_ends=np.arange(1, entries + 1, dtype=np.int64) * 12,
        locations=np.tile(np.array([[0, 0, 0]], np.int64), (entries, 1)),
        labels=None,
        class_names=(),
        containers=((Kind.FILE, str(scratch)),),
        sources=((str(scratch), entries),),
    )
    index.save(scratch / "index")
    command = [sys.executable, "-c", OPEN, str(scratch / "index")]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    opened_s, grown_mb, found = map(float, ended.stdout.split())
    print(f"  an index of {entries:,} entries opens in {1e3 * opened_s:.1f} ms, +{grown_mb:.0f} MB")
    return found != entries or opened_s > OPEN_LIMIT_S or grown_mb > INDEX_LIMIT_MB


def memory_mb() -> float:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6
