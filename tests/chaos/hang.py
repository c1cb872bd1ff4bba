"""SIGSTOP of a rank of a real job: named in time, stacks written, nothing left behind."""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distill.runfolder.failure import LOST_EXIT_CODE
from distill.runfolder.heartbeat import read_records, stacks_path
from tests.support import jobs

NUM_RANKS = 2
TIMEOUT_S = 120.0


def run(arguments: list[str]) -> bool:
    """True when a claim did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos hang", description=__doc__)
    parser.add_argument("--count", type=int, default=4, help="hangs, one job each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=30.0, help="engine.hang_limit_s")
    options = parser.parse_args(arguments)
    draw, wrong, seconds = random.Random(options.seed), [], []
    with tempfile.TemporaryDirectory() as name:
        recipe = jobs.write_recipes(Path(name), stage_steps=20, steps=100_000, save_every=1000)
        for number in range(options.count):
            out = Path(name) / f"hang-{number}"
            took_s, problems = _stop_a_rank(recipe, out, options.limit, draw)
            seconds.append(took_s)
            wrong += [f"hang {number}: {problem}" for problem in problems]
    told = ", ".join(f"{took:.1f}" for took in seconds)
    lines = [
        f"hangs: {options.count}; limit {options.limit:g} s; named after {told} s",
        f"wrong: {len(wrong)}",
    ]
    sys.stdout.write("\n".join([*lines, *wrong]) + "\n")
    return bool(wrong)


def _stop_a_rank(
    recipe: Path, out: Path, limit_s: float, draw: random.Random
) -> tuple[float, list[str]]:
    """Seconds until a stopped rank was named, and which claims did not hold."""
    process, run_folder = jobs.start(recipe, out, f"engine.hang_limit_s={limit_s}"), out / jobs.RUN
    try:
        jobs.wait_for_step(process, run_folder, "family", 20)
        sign = draw.choice(read_records(run_folder, NUM_RANKS))
        time.sleep(draw.uniform(0.0, 1.0))
        ranks = jobs.ranks_of(process.pid)
        os.kill(sign.pid, signal.SIGSTOP)
        stopped = time.monotonic()
        named_after_s = _wait_for_failure(run_folder / "failure.json", stopped, limit_s + 30.0)
        said, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return TIMEOUT_S, ["the job did not end"]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    who = rf"rank {sign.world_rank} on {re.escape(sign.host)}: \w+.*, family step \d+"
    stacks = [stacks_path(run_folder, rank) for rank in range(NUM_RANKS)]
    claims = {
        f"named only after {named_after_s:.1f} s": named_after_s <= limit_s,
        f"not named in {said[-500:]!r}": re.search(who, said) is not None,
        f"exit code {process.returncode}": process.returncode == LOST_EXIT_CODE,
        "no stacks": all(p.is_file() and "File " in p.read_text() for p in stacks),
        "ranks left behind": not jobs.left_after(ranks, wait_s=5.0),
    }
    return named_after_s, [problem for problem, holds in claims.items() if not holds]


def _wait_for_failure(path: Path, since: float, wait_s: float) -> float:
    while not path.is_file() and time.monotonic() - since < wait_s:
        time.sleep(0.05)
    return time.monotonic() - since
