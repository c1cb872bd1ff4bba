"""A real SLURM of two nodes: srun and a batch job train the same family, and a requeue in the middle changes no bit."""

import sys
import time
from collections.abc import Iterator
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
    deadline = time.monotonic() + WAIT_S
    while jobs.status_of(run).get("phase") != "gram":
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.05)
    cluster.call("scontrol", "requeue", job)
    wait_for(cluster, job, "PENDING", output)
    saved = jobs.status_of(run)
    assert saved["state"] == "stopped" and saved["last_checkpoint"]["phase"] == "gram"
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # not in two minutes
    wait_for(cluster, job, "COMPLETED", output)
    assert jobs.status_of(run)["state"] == "finished"
    jobs.assert_equal_students(tmp_path / "srun" / jobs.RUN, run)
