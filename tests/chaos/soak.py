"""A long real job with all faults mixed, until it is finished; the weights must be those of a job without one.

rank, launcher, all   SIGKILL, as in ``kills``
stopped               SIGSTOP of a rank, which the job finds and starts again
asleep                SIGSTOP of every process of the job and SIGCONT 7 s later, which is no fault
signal                SIGTERM or SIGHUP to the launcher: saved, stopped, the same command again
save                  SIGUSR1 to the launcher
storage               EIO from two pictures for 2 s
"""

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.chaos.kills import TARGETS, TIMEOUT_S, Tally, _moment, _strike
from tests.support import jobs, storage_faults

KINDS = (*TARGETS, "stopped", "asleep", "signal", "save", "storage")
LIMIT_S = 10.0  # engine.hang_limit_s
ASLEEP_S, REFUSES_S = 7.0, 2.0


def run(arguments: list[str]) -> bool:
    """True when a claim did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos soak", description=__doc__)
    parser.add_argument("--count", type=int, default=40, help="faults, over as many jobs as needed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000, help="of the family phase")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND")
    options = parser.parse_args(arguments)
    draw, tally = random.Random(options.seed), Tally()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = jobs.write_recipes(folder, stage_steps=30, steps=options.steps, save_every=20)
        environment = storage_faults.environment(folder / "storage", ("/3.png", "/7.png"))
        calm = jobs.start(recipe, folder / "calm")
        said, _ = calm.communicate(timeout=TIMEOUT_S + options.steps)
        assert calm.returncode == 0, said
        while sum(tally.kills.values()) < options.count:
            out = folder / f"job-{tally.num_jobs}"
            _soak(recipe, out, environment, options, draw, tally)
            tally.num_jobs += 1
            if tally.wrong:
                break
            different = jobs.differing(folder / "calm" / jobs.RUN, out / jobs.RUN)
            tally.wrong += [f"job {tally.num_jobs}: {name} differs" for name in different]
        print(tally.summary().replace("kills:", "faults:"), flush=True)
    return bool(tally.wrong) or tally.num_named < tally.num_nameable


def _soak(
    recipe: Path,
    out: Path,
    environment: dict[str, str],
    options: argparse.Namespace,
    draw: random.Random,
    tally: Tally,
) -> None:
    """One job from its first launch to its end, with faults until the count is reached."""
    run_folder = out / jobs.RUN
    words = ("--max-restarts", str(options.count), f"engine.hang_limit_s={LIMIT_S:g}")
    process: subprocess.Popen[str] | None = None
    while True:
        if process is None:
            process = jobs.start(recipe, out, *words, environment=environment)
            tally.num_launches += 1
        is_enough = sum(tally.kills.values()) >= options.count
        try:
            limit_s = TIMEOUT_S + options.steps
            wait_s = limit_s if is_enough else _moment(run_folder, draw)
            said, _ = process.communicate(timeout=wait_s)
        except subprocess.TimeoutExpired:
            if is_enough:
                os.killpg(process.pid, signal.SIGKILL)
                tally.wrong.append("a job did not end")
                return
        else:
            if process.returncode != 0:
                tally.wrong.append(f"exit code {process.returncode}: {said[-2000:]}")
            return
        kind = draw.choice(options.kinds)
        print(f"{time.strftime('%H:%M:%S')} {kind}", flush=True)
        if kind in TARGETS:
            is_there = _strike(process, run_folder, kind, draw, tally)
        else:
            tally.kills[kind] += 1
            is_there = _disturb(process, kind, run_folder, draw, tally)
        process = process if is_there else None


def _disturb(
    process: subprocess.Popen[str], kind: str, run: Path, draw: random.Random, tally: Tally
) -> bool:
    """One fault that is no SIGKILL; whether the launcher is still there."""
    ranks = jobs.ranks_of(process.pid)  # none: it has just begun, and listens to no signal yet
    if kind == "storage":
        mark = run.parents[1] / "storage" / "mark"
        mark.touch()
        time.sleep(REFUSES_S)
        mark.unlink()
    elif kind == "asleep":
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in jobs.session_of(process.pid):
                os.kill(pid, number)
            time.sleep(ASLEEP_S if number == signal.SIGSTOP else 0.0)
    elif kind == "stopped" and ranks:
        stopped = draw.choice(ranks)
        os.kill(stopped, signal.SIGSTOP)
        # a launcher that is killed before it has ended the rank leaves it, which is a known limit
        if jobs.left_after([stopped], wait_s=6 * LIMIT_S):
            tally.wrong.append("a stopped rank was not ended")
    elif kind == "save" and ranks:
        process.send_signal(signal.SIGUSR1)
    elif kind == "signal":
        number = draw.choice((signal.SIGTERM, signal.SIGHUP))
        process.send_signal(number)
        said, _ = process.communicate(timeout=TIMEOUT_S)
        if process.returncode not in ((0,) if ranks else (0, -number)):
            tally.wrong.append(f"exit code {process.returncode} after a signal: {said[-2000:]}")
        return False
    return True
