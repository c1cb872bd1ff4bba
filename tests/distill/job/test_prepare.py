"""The run folder before anything starts: ``--fresh``, and folders that are links."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from distill.errors import CheckpointError, DataError, SetupError
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


def test_prepare__says_and_stores_what_was_passed_over(tmp_path: Path) -> None:
    data, lines = write_images(tmp_path / "images"), list[str]()
    (data / "tif").mkdir()
    (data / "tif/1.tif").touch()
    (data / "._x.jpg").touch()
    first = next(data.rglob("*.png"))
    first.rename(data / "loose.png")
    (tmp_path / "teacher.yaml").write_text(TEACHER.replace("DATA", str(data)))
    run = tmp_path / "runs/tiny"
    request = JobRequest(str(tmp_path / "teacher.yaml"), (), str(run), "")
    prepare(request, num_ranks=1, fresh=False, say=lines.append)
    assert "held out, passed over: 1 system file ._*, 1 with suffix .tif (" in lines[0]
    assert lines[1] == "images: no picture that is read in tif (1 with suffix .tif)"
    assert "1 of" in lines[2] and "have no label" in lines[2]
    facts = json.loads((run / "data/images.json").read_text())
    assert facts["without_label"] == 1 and facts["lost_classes"] == ["tif (1 with suffix .tif)"]
    assert facts["passed_over"] == {"with suffix .tif": 1, "system file ._*": 1}
    assert facts["held_out"] and not facts["no_held_out"]


def test_prepare__nothing_held_out(tmp_path: Path) -> None:
    data, lines = write_images(tmp_path / "images"), list[str]()
    (tmp_path / "teacher.yaml").write_text(TEACHER.replace("DATA", str(data)))
    run = tmp_path / "runs/tiny"
    for fraction in (0.2, 0):
        words = (f"data.held_out={fraction}",)
        request = JobRequest(str(tmp_path / "teacher.yaml"), words, str(run), "")
        prepare(request, num_ranks=1, fresh=False, say=lines.append)
        assert (run / "data/held_out").exists() == bool(fraction)  # none of the start before
    assert " 0 held out (" in lines[-1]
    facts = json.loads((run / "data/images.json").read_text())
    assert "data.held_out is 0" in facts["no_held_out"]


def test_prepare__an_index_of_another_label_depth_is_refused(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images")
    (tmp_path / "teacher.yaml").write_text(TEACHER.replace("DATA", str(data)))
    words = f"data.index={tmp_path}/index", "data.held_out=0"
    for depth in ("", "data.sources.0.label_depth=0"):
        given = (*words, depth) if depth else words
        request = JobRequest(str(tmp_path / "teacher.yaml"), given, str(tmp_path / "runs/x"), "")
        if depth:
            with pytest.raises(DataError, match="is of other sources"):
                prepare(request, num_ranks=1, fresh=True, say=lambda _: None)
        else:
            prepare(request, num_ranks=1, fresh=False, say=lambda _: None)


def test_prepare__refuses_to_compile_trained_networks_under_zero_3(
    request_of_link: JobRequest,
) -> None:
    overrides = ("engine.compile=true", "engine.zero=3")
    request = replace(request_of_link, overrides=overrides)
    with pytest.raises(SetupError, match=r"cannot be compiled with engine\.zero = 3"):
        prepare(request, num_ranks=1, fresh=False, say=lambda _: None)
    assert not Path(request.run_folder).exists(), "nothing is left"
