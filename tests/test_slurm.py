"""A real SLURM of two nodes: srun and a batch job train the same family, and a requeue in the middle changes no bit."""

import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import jobs, slurm
from tests.support.slurm import Cluster

WAIT_S = 240.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    programs = slurm.find()
    if isinstance(programs, str):
        pytest.skip(programs)
    folder = tmp_path / "slurm"
    folder.mkdir()
    with slurm.cluster(programs, folder) as running:
        running.environment["MASTER_ADDR"] = "127.0.0.1"  # the names of its nodes have no address
        yield running


def wait_for(cluster: Cluster, job: str, state: str, output: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while (now := cluster.state_of(job)) != state:
        told = output.read_text(errors="replace")[-3000:] if output.is_file() else ""
        assert now in {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"}, (now, told)
        assert time.monotonic() < deadline, (now, told)
        time.sleep(0.2)


def processes_with(word: str) -> list[str]:
    """Command lines that have a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found += [line for line in [path.read_text(errors="replace")] if word in line]
    return found


def wait_for_phase(run: Path, phase: str, output: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while jobs.status_of(run).get("phase") != phase:
        assert time.monotonic() < deadline, output.read_text() if output.is_file() else "no output"
        time.sleep(0.05)


@pytest.mark.slow
def test_slurm__a_requeued_batch_job_ends_with_the_bits_of_srun(
    cluster: Cluster, tmp_path: Path
) -> None:
    recipe = str(jobs.write_recipes(tmp_path, stage_steps=20, steps=4, save_every=1000))
    distill = (sys.executable, "-m", "distill")
    words = (recipe, "engine.processes=1")
    cluster.call("srun", "-N2", *distill, "train", *words, "--out", str(tmp_path / "srun"), timeout_s=WAIT_S)  # fmt: skip
    submit = ("launch", "slurm", *words, "--nodes", "2", "--cpus-per-task", "1")
    printed = cluster.call(*distill, *submit, "--out", str(tmp_path))
    job, run = printed.split()[1], tmp_path / jobs.RUN
    assert f"distill watch {run}" in printed
    output = tmp_path / f"{jobs.RUN}-{job}.out"
    wait_for_phase(run, "gram", output)
    cluster.call("scontrol", "requeue", job)
    wait_for(cluster, job, "PENDING", output)
    saved = jobs.status_of(run)
    assert saved["state"] == "stopped" and saved["last_checkpoint"], saved
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # not in two minutes
    wait_for(cluster, job, "COMPLETED", output)
    assert jobs.status_of(run)["state"] == "finished"
    jobs.assert_equal_students(tmp_path / "srun" / jobs.RUN, run)


@pytest.mark.slow
def test_slurm__a_cancelled_job_saves_and_leaves_no_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    family = jobs.write_recipes(tmp_path, stage_steps=5000, steps=4, save_every=5000)
    words = (str(family.with_name("teacher.yaml")), "engine.processes=1", "engine.log_every=1")
    submit = ("launch", "slurm", *words, "--nodes", "2", "--cpus-per-task", "1")
    printed = cluster.call(sys.executable, "-m", "distill", *submit, "--out", str(tmp_path))
    job, run = printed.split()[1], tmp_path / "tiny-teacher"
    output = tmp_path / f"tiny-teacher-{job}.out"
    wait_for_phase(run, "base", output)
    assert len(processes_with(words[0])) >= 2
    cluster.call("scancel", job)
    wait_for(cluster, job, "CANCELLED", output)
    deadline = time.monotonic() + WAIT_S
    while left := processes_with(words[0]):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
    status = jobs.status_of(run)
    assert status["state"] == "stopped" and status["last_checkpoint"]["step"] > 0, (
        output.read_text()
    )
