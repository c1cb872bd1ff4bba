"""A whole job whose processes are all killed before one of its operations on the disk, in every moment of a job in turn.

The operations of an undisturbed job are counted by moment (``striker``). Each case draws one, ends the job
there by SIGKILL of every process, and runs the same command again, nothing else. The weights must be those
of the undisturbed job, bit for bit.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import jobs

ROOT = Path(__file__).parents[2]
MOMENTS = (
    "preparation",
    "index",
    "between phases",
    "head fitting",
    "saving",
    "export",
    "scoring",
    "picture",
    "restart",
)
OF_A_RESTART = 8  # operations of a restart, about
TIMEOUT_S = 400.0
RESTARTS = ("--max-restarts", "2")


@dataclass
class Work:
    """A recipe with its words, its undisturbed run and the operations of that by moment."""

    recipe: Path
    words: tuple[str, ...]
    calm: Path
    counts: Counter[str] = field(default_factory=Counter)


def run(arguments: list[str]) -> bool:
    """True when a claim did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos moments", description=__doc__)
    parser.add_argument("--count", type=int, default=18, help="jobs that are killed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS, metavar="MOMENT")
    options = parser.parse_args(arguments)
    draw, struck, wrong = random.Random(options.seed), Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        (folder / "sitecustomize.py").write_text(
            "from tests.chaos.striker import install\ninstall()\n"
        )
        family, fitting = prepare(folder, is_fitting="head fitting" in options.moments)
        for case in range(options.count):
            moment = options.moments[case % len(options.moments)]
            work = fitting if moment == "head fitting" else family
            assert work is not None, "it was prepared"
            at, problem = kill_at(folder, case, moment, work, draw)
            struck[moment] += bool(at)
            print(f"case {case}: {at or moment + ', not reached'}: {problem or 'held'}", flush=True)
            if problem:
                wrong.append(f"case {case}, {at or moment}: {problem}")
    counts = ", ".join(f"{struck[moment]} in {moment}" for moment in options.moments)
    print(f"moments: {options.count} jobs, {sum(struck.values())} killed: {counts}")
    print(f"wrong: {len(wrong)}")
    for line in wrong:
        print(f"  {line}")
    return bool(wrong)


def prepare(folder: Path, *, is_fitting: bool) -> tuple[Work, Work | None]:
    """The undisturbed jobs: a teacher and its family, and a family whose teacher's heads are fitted first."""
    recipe = jobs.write_recipes(folder, stage_steps=11, steps=8, save_every=5)
    family = Work(recipe, (), folder / "calm" / jobs.RUN)
    settle(folder, family)
    if not is_fitting:
        return family, None
    words = tuple(jobs.without_heads(family.calm, "fit"))
    fitting = Work(recipe, words, folder / "calm-fit" / jobs.RUN)
    settle(folder, fitting)
    return family, fitting


def settle(folder: Path, work: Work) -> None:
    """Runs a job undisturbed and counts its operations."""
    log = folder / f"{work.calm.parent.name}.log"
    code, said = launch(folder, work, work.calm, {"STRIKE_LOG": str(log)})
    assert code == 0, said
    work.counts.update(line.split("\t")[0] for line in log.read_text().splitlines())


def launch(folder: Path, work: Work, run_folder: Path, strike: dict[str, str]) -> tuple[int, str]:
    """The one command, with or without something that ends it; exit code and what was printed."""
    path = f"{folder}{os.pathsep}{ROOT}"
    environment = {**jobs.ENVIRONMENT, "PYTHONPATH": path, **strike}
    if strike:
        environment["STRIKE_RUN"] = str(run_folder)
    command = ["-m", "distill", "train", str(work.recipe), *work.words]
    process = subprocess.Popen(
        [sys.executable, *command, "--out", str(run_folder.parent), *RESTARTS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return -1, f"did not end: {said}"
    return process.returncode, said


def kill_at(
    folder: Path, case: int, moment: str, work: Work, draw: random.Random
) -> tuple[str, str]:
    """Where the job was killed, empty where it ended before, and what is wrong with it afterwards."""
    run_folder, mark = folder / f"case-{case}" / jobs.RUN, folder / f"mark-{case}"
    most = OF_A_RESTART if moment == "restart" else work.counts[moment]
    assert most, f"an undisturbed job has no operation in {moment}"
    strike = {
        "STRIKE_MOMENT": moment,
        "STRIKE_AT": str(draw.randint(1, most)),
        "STRIKE_MARK": str(mark),
    }
    if moment == "restart":
        strike["STRIKE_FIRST"] = str(folder / f"first-{case}")
    code, said = launch(folder, work, run_folder, strike)
    at = mark.read_text() if mark.exists() else ""
    if not at and code != 0:
        return at, f"exit code {code} before it was killed: {said[-2000:]}"
    if at:
        if code != -signal.SIGKILL:
            return at, f"exit code {code} of a job that was killed"
        code, said = launch(folder, work, run_folder, {})
        if code != 0:
            return at, f"the same command ended with {code}: {said[-2000:]}"
    different = jobs.differing(work.calm, run_folder)
    is_scored = (run_folder / "summary.json").is_file()
    shutil.rmtree(run_folder.parent)
    if different:
        return at, f"{len(different)} tensors differ, such as {different[0]}"
    return at, "" if is_scored else "no summary"
