"""Storage that refuses a picture: a job of one rank has the bits of one without the fault, or ends with one line and goes on later."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.runfolder.events import read_events
from distill.runfolder.failure import LOST_EXIT_CODE
from tests.support import jobs, storage_faults

pytestmark = pytest.mark.slow
NAMES = ("/3.png", "/7.png")  # of both classes


def train(
    folder: Path,
    name: str,
    environment: dict[str, str],
    *words: str,
    before: tuple[str, ...] = (),
) -> "subprocess.CompletedProcess[str]":
    """Runs the teacher recipe with one rank, to its end."""
    command = [*before, sys.executable, "-m", "distill", "train", str(folder / "teacher.yaml")]
    options = ["--out", str(folder), "--name", name, "engine.processes=1", "engine.log_every=1"]
    return subprocess.run(
        [*command, *options, *words], env=environment, capture_output=True, text=True, timeout=240
    )


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "teacher" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes, images, and a run without a fault."""
    folder = tmp_path_factory.mktemp("storage")
    jobs.write_recipes(folder, stage_steps=10, steps=10, save_every=5)
    done = train(folder, "good", dict(jobs.ENVIRONMENT))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_storage__one_error_of_a_file_leaves_the_bits_as_they_were(folder: Path) -> None:
    environment = storage_faults.environment(folder / "once", NAMES, once=True)
    done = train(folder, "stutters", environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / "stutters" / "bad_samples.jsonl").exists()
    assert_same_weights(folder / "good", folder / "stutters")


@pytest.mark.skipif(
    bool(storage_faults.why_no_strace()), reason=storage_faults.why_no_strace() or "strace works"
)
@pytest.mark.parametrize("call", ["openat", "pread64"])
def test_storage__system_calls_that_fail_leave_the_bits_as_they_were(
    folder: Path, call: str
) -> None:
    log = folder / f"{call}.txt"
    paths = [word for name in NAMES for word in ("-P", f"{folder}/images/across{name}")]
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when=1"]
    before = ("strace", "-f", "-o", str(log), *paths, *inject)
    done = train(folder, call, dict(jobs.ENVIRONMENT), before=before)
    assert done.returncode == 0, done.stdout + done.stderr
    assert log.read_text().count("INJECTED") > 2  # the launcher's threads, and the rank's
    assert not (folder / call / "bad_samples.jsonl").exists()
    assert_same_weights(folder / "good", folder / call)


def test_storage__that_stays_away_ends_the_job_with_one_line_and_it_goes_on_later(
    folder: Path,
) -> None:
    environment = storage_faults.environment(folder / "away", NAMES, patience_s=4.0)
    mark = folder / "away" / "mark"
    mark.touch()
    ended = train(folder, "gone", environment, "--max-restarts", "1")
    printed, run = ended.stdout + ended.stderr, folder / "gone"
    assert ended.returncode == LOST_EXIT_CODE, printed
    line = next(line for line in printed.splitlines() if line.startswith("rank 0 on "))
    assert line.startswith(f"rank 0 on {os.uname().nodename}: {folder}/images/a")
    assert ".png: the storage does not give it (Input/output error), tried again for 4 s" in line
    assert "--max-restarts" in printed and "waiting for storage: " in printed
    texts = [event.text for event in read_events(run)]
    assert sum("restart 1 of 1" in text for text in texts) == 1
    assert sum("the storage does not give it" in text for text in texts) == 2
    assert not (run / "bad_samples.jsonl").exists()
    mark.unlink()
    done = train(folder, "gone", environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_weights(folder / "good", run)


@pytest.mark.skipif(
    bool(storage_faults.why_no_strace()), reason=storage_faults.why_no_strace() or "strace works"
)
def test_storage__without_locks_a_job_starts_with_one_warning(folder: Path) -> None:
    log, run = folder / "flock.txt", folder / "unlocked"
    inject = ["-e", "trace=flock", "-e", "inject=flock:error=ENOSYS"]
    locked = f"{folder}/.unlocked.lock"  # the store of torch, on a disk of its own, needs its lock
    before = ("strace", "-f", "-o", str(log), "-P", locked, *inject)
    done = train(folder, "unlocked", dict(jobs.ENVIRONMENT), before=before)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert printed.count(f"{run}: no locks here (Function not implemented)") == 1
    assert log.read_text().count("INJECTED") >= 3  # the launcher's two, and the rank's
    assert_same_weights(folder / "good", run)
