"""The run folder before anything starts: ``--fresh``, and folders that are links."""

import json
import shutil
from pathlib import Path

import pytest

from distill.errors import CheckpointError
from distill.job import prepare as module
from distill.job.prepare import JobRequest, prepare
from distill.runfolder.lock import run_lock
from tests.support.command import Run
from tests.support.jobs import TEACHER, write_images


@pytest.fixture
def request_of_link(tmp_path: Path) -> JobRequest:
    """A job whose run folder is a link to a folder on another disk that is not there yet."""
    data = write_images(tmp_path / "images")
    (tmp_path / "teacher.yaml").write_text(TEACHER.replace("DATA", str(data)))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/tiny").symlink_to(tmp_path / "disk/tiny")
    return JobRequest(str(tmp_path / "teacher.yaml"), (), str(tmp_path / "runs/tiny"), "")


def start(request: JobRequest, *, fresh: bool) -> Path:
    prepare(request, num_ranks=1, fresh=fresh, say=lambda _: None)
    return Path(request.run_folder)


def test_prepare__fresh_empties_the_folder_that_a_link_leads_to(
    request_of_link: JobRequest, tmp_path: Path
) -> None:
    run = start(request_of_link, fresh=False)
    real = tmp_path / "disk/tiny"
    assert json.loads((real / "job.json").read_text())["request"]["run_folder"] == str(run)
    (real / "events.jsonl").touch()
    start(request_of_link, fresh=False)
    assert (real / "events.jsonl").exists()
    elsewhere = tmp_path / "elsewhere"
    for folder in (real / "checkpoints/base-10", elsewhere):
        folder.mkdir(parents=True)
        (folder / "weights").touch()
    (real / "students").symlink_to(elsewhere)
    start(request_of_link, fresh=True)
    assert run.is_symlink() and (run / "job.json").is_file()
    left = {path.name for path in real.iterdir()}
    assert not left & {"checkpoints", "events.jsonl", "students"}
    assert (elsewhere / "weights").is_file(), "a link inside is removed, not what it leads to"


def test_prepare__fresh_says_what_it_could_not_remove_and_starts_nothing(
    request_of_link: JobRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(request_of_link, fresh=False)
    (run / "checkpoints").mkdir()
    before = {path.name for path in run.iterdir()}

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path / "weights"))

    monkeypatch.setattr(module, "remove", refuse)
    with pytest.raises(CheckpointError, match="checkpoints: --fresh could not remove it") as found:
        start(request_of_link, fresh=True)
    assert "Permission denied" in found.value.message and "by hand" in found.value.fix
    assert {path.name for path in run.iterdir()} == before, "checkpoints come first"


def test_prepare__the_same_command_goes_on_where_a_start_was_killed_or_the_disk_was_full(
    request_of_link: JobRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each file that is written, from the first one on."""

    def give_out(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for writer in ("write_json", "write_recipes", "_environment"):
        with monkeypatch.context() as patch:
            patch.setattr(module, writer, give_out)
            with pytest.raises(OSError, match="No space left"):
                start(request_of_link, fresh=False)
        (Path(request_of_link.run_folder) / ".job.json.123.part").touch()
        start(request_of_link, fresh=writer == "write_recipes")
        shutil.rmtree(Path(request_of_link.run_folder).resolve())


def test_eval__of_a_folder_where_a_job_is_at_work_is_refused_under_every_name(
    request_of_link: JobRequest, distill: Run, tmp_path: Path
) -> None:
    run = start(request_of_link, fresh=False)
    with run_lock(tmp_path / "disk/../disk/tiny") as lock:
        lock.alone()
        ended = distill("eval", run)
    assert ended.code == 1 and "another job is at work in it" in ended.err
