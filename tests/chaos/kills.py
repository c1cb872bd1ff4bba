"""SIGKILL of a rank, the launcher or all of them at random moments of a real job; the weights must not notice.

A killed rank is the launcher's business (--max-restarts). After the launcher was killed the same
command is run again, which is all that a scheduler or a shell loop would do.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from distill.runfolder.events import read_events
from distill.runfolder.heartbeat import read_records
from tests.support import jobs

TARGETS = ("rank", "launcher", "all")
LATEST_S = 9.0  # after a start: about half of it is spent before the first step
MOVING_S = 30.0  # until a job that was started has surely begun to move
TIMEOUT_S = 300.0  # of a job that nobody kills
NUM_RANKS = 2


@dataclass
class Tally:
    """What was done, and what went wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    num_named: int = 0
    num_nameable: int = 0
    num_launches: int = 0
    num_jobs: int = 0
    wrong: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """The counts on a few lines."""
        kills = ", ".join(f"{count} of {target}" for target, count in sorted(self.kills.items()))
        lines = [
            f"kills: {sum(self.kills.values())} ({kills}); {self.num_launches} launches of the same command, {self.num_jobs} jobs",
            f"killed ranks that were named: {self.num_named} of {self.num_nameable}",
            f"wrong: {len(self.wrong)}",
        ]
        return "\n".join([*lines, *self.wrong])


def run(arguments: list[str]) -> bool:
    """True when a claim did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos kills", description=__doc__)
    parser.add_argument(
        "--count", type=int, default=20, help="kills, over as many jobs as it takes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--steps", type=int, default=200, help="of the family phase")
    parser.add_argument("--stage-steps", type=int, default=60, help="of the teacher's first stage")
    options = parser.parse_args(arguments)
    draw, tally = random.Random(options.seed), Tally()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = jobs.write_recipes(
            folder, stage_steps=options.stage_steps, steps=options.steps, save_every=10
        )
        calm = jobs.start(recipe, folder / "calm")
        said, _ = calm.communicate(timeout=TIMEOUT_S)
        assert calm.returncode == 0, said
        while sum(tally.kills.values()) < options.count or not tally.num_jobs:
            out = folder / f"killed-{tally.num_jobs}"
            _disturb(recipe, out, options, draw, tally)
            tally.num_jobs += 1
            different = jobs.differing(folder / "calm" / jobs.RUN, out / jobs.RUN)
            tally.wrong += [f"job {tally.num_jobs}: {name} differs" for name in different]
            print(f"after job {tally.num_jobs}: {tally.summary()}", flush=True)
    sys.stdout.write(tally.summary() + "\n")
    return bool(tally.wrong) or tally.num_named < tally.num_nameable


def _disturb(
    recipe: Path, out: Path, options: argparse.Namespace, draw: random.Random, tally: Tally
) -> None:
    """One job from its first launch to its end, killed until the count is reached."""
    count: int = options.count
    words = ("--max-restarts", str(count))
    process = jobs.start(recipe, out, *words)
    tally.num_launches += 1
    while True:
        is_enough = sum(tally.kills.values()) >= count
        try:
            moment_s = TIMEOUT_S if is_enough else _moment(out / jobs.RUN, draw)
            said, _ = process.communicate(timeout=moment_s)
        except subprocess.TimeoutExpired:
            if is_enough:
                os.killpg(process.pid, signal.SIGKILL)
                tally.wrong.append("a job did not end")
                return
        else:
            if process.returncode != 0:
                tally.wrong.append(f"exit code {process.returncode}: {said[-2000:]}")
            return
        if not _strike(process, out / jobs.RUN, draw.choice(options.targets), draw, tally):
            process = jobs.start(recipe, out, *words)
            tally.num_launches += 1


def _moment(run: Path, draw: random.Random) -> float:
    """Seconds to wait: at any time after a start, or soon after the job has begun to move again."""
    if draw.random() < 0.5:
        return draw.uniform(0.2, LATEST_S)
    started = time.time()
    while time.time() < started + MOVING_S:
        status = jobs.status_of(run)
        if status.get("state") == "finished" or status.get("updated_unix", 0.0) > started + 1.0:
            break
        time.sleep(0.05)
    return draw.uniform(0.0, 2.0)


def _strike(
    process: subprocess.Popen[str], run: Path, target: str, draw: random.Random, tally: Tally
) -> bool:
    """Kills something; whether the launcher is still there."""
    ranks, servers = jobs.ranks_of(process.pid), jobs.servers_of(process.pid)
    if target == "rank" and len(ranks) < NUM_RANKS:
        return True  # just starting or just ending: another time
    tally.kills[target] += 1
    if target == "rank":
        _kill_rank(draw.choice(ranks), run, tally)
        return True
    for pid in (process.pid, *(ranks if target == "all" else ())):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    left = jobs.left_after([*ranks, *servers], wait_s=10.0)
    if left:
        tally.wrong.append(f"{len(left)} processes outlived their launcher")
    return False


def _kill_rank(pid: int, run: Path, tally: Tally) -> None:
    """Kills a rank and waits for the job to say which one; ranks without a first sign have no name yet."""
    known = [sign for sign in read_records(run, NUM_RANKS) if sign.pid == pid and not sign.end]
    since = time.time()
    os.kill(pid, signal.SIGKILL)
    if not known:
        return
    tally.num_nameable += 1
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        told = [event.text for event in read_events(run, since_unix=since)]
        if told:
            is_named = told[0].startswith(f"rank {known[0].world_rank} on {known[0].host}")
            tally.num_named += is_named
            tally.wrong += [] if is_named else [f"{known[0].describe()} was killed: {told[0]}"]
            return
        time.sleep(0.2)
    tally.wrong.append(f"{known[0].describe()} was killed: nothing was said")
