"""A run folder that is renamed or deleted under a running job: every process ends, with one line and exit code 4."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.runfolder import presence
from distill.runfolder.failure import LOST_EXIT_CODE
from distill.runfolder.presence import FolderPresence
from tests.support import jobs
from tests.support.storage_faults import ROOT

FAULT = "import distill.runfolder.presence as presence\npresence.GONE_LIMIT_S = {limit_s}\n"


@pytest.fixture
def process(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator["subprocess.Popen[str]"]:
    """A job of two ranks that trains; a run folder may be gone for ``request.param`` seconds."""
    (tmp_path / "sitecustomize.py").write_text(FAULT.format(limit_s=request.param))
    recipe = jobs.write_recipes(tmp_path, stage_steps=100_000, steps=10, save_every=20)
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    started = jobs.start(recipe.with_name("teacher.yaml"), tmp_path, environment=environment)
    jobs.wait_for_step(started, tmp_path / "tiny-teacher", "base", 20)
    while not (tmp_path / "tiny-teacher" / "checkpoints" / "latest").is_file():
        assert started.poll() is None
        time.sleep(0.05)
    yield started
    if jobs.session_of(started.pid):
        os.killpg(started.pid, signal.SIGKILL)
    started.communicate()


def assert_ended(process: "subprocess.Popen[str]", run: Path) -> None:
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == LOST_EXIT_CODE, printed
    lines = [line for line in printed.splitlines() if "the run folder is gone for" in line]
    assert len(lines) == 1 and lines[0].startswith(f"{run}: "), printed
    assert "Traceback" not in printed and "Give it its name back" in printed
    deadline = time.monotonic() + 20.0  # the fork server takes down what it has imported
    while (left := jobs.session_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize("process", [2.0], indirect=True)
def test_run_folder__renamed_ends_every_process_and_its_checkpoints_go_on(
    process: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    run = tmp_path / "tiny-teacher"
    run.rename(tmp_path / "elsewhere")
    assert_ended(process, run)
    assert not run.exists()
    assert (tmp_path / "elsewhere" / "checkpoints" / "latest").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("process", [4.0], indirect=True)
def test_run_folder__deleted_and_sigterm_leaves_no_launcher(
    process: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    run = tmp_path / "tiny-teacher"
    run.rename(tmp_path / "gone")  # at once, as an administrator does it
    shutil.rmtree(tmp_path / "gone")
    process.terminate()
    assert_ended(process, run)


def test_presence__a_folder_may_be_gone_for_a_moment_and_another_one_is_none(
    tmp_path: Path,
) -> None:
    now = 0.0
    run = tmp_path / "run"
    run.mkdir()
    watched = FolderPresence(run, limit_s=60.0, clock=lambda: now)
    assert watched.gone_s() is None
    run.rename(tmp_path / "other")
    assert watched.gone_s() == 0.0
    now = 59.0
    assert watched.look() is None and watched.gone_s() == 59.0
    (tmp_path / "other").rename(run)
    now = 61.0
    assert watched.look() is None and watched.wait() is None
    run.rename(tmp_path / "other")
    run.mkdir()  # made anew by whatever writes into it
    assert watched.gone_s() == 0.0
    now = 121.0
    failure = watched.look()
    assert failure is not None and failure.exit_code == LOST_EXIT_CODE and failure.kind == "user"
    assert failure == watched.wait()
    assert failure.message.startswith(f"{run}: the run folder is gone for 60 s")
    watched.close()
    assert presence.GONE_LIMIT_S == 60.0
