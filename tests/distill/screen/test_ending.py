"""What a finished run shows: box, lines, README and log.txt hold the same."""

import io
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from distill.runfolder.status import StatusFile
from distill.screen.console import make_console
from distill.screen.ending import ending_box, ending_of, ending_page
from distill.screen.watch import LOG, watch
from tests.support.run_folders import SUMMARY, write_run
from tests.support.status import STATUS


def test_ending__names_folders_and_three_commands() -> None:
    ending = ending_of(Path("runs/my run"), SUMMARY)
    assert ending.folders == {
        "small": "runs/my run/students/small",
        "tiny": "runs/my run/students/tiny",
    }
    assert list(ending.commands) == [
        "distill report 'runs/my run'",
        "distill export 'runs/my run' --to hf",
        "distill compare 'runs/my run' OTHER",
    ]
    untrained = {"students": {"small": {"steps": 0}, "tiny": {"steps": 3}}}
    assert list(ending_of(Path("a"), untrained).folders) == ["tiny"]
    teacher = ending_of(Path("a"), {"teacher": {"knn": 0.5}})
    assert teacher.folders == {"teacher": "a/teacher"}
    assert "distill export a --to hf --student teacher" in teacher.commands


def test_ending__custom_students_are_for_onnxruntime(tmp_path: Path) -> None:
    folder = tmp_path / "students" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "distill_custom", "factory": "a:b"}')
    commands = ending_of(tmp_path, {"students": {"small": {"steps": 3}}}).commands
    assert commands[f"distill export {tmp_path} --to onnx"] == "files for onnxruntime; also factory"


def test_box__has_scores_folders_commands_and_the_line_that_sums_up() -> None:
    file = io.StringIO()
    summary = {**SUMMARY, "conclusion": {"text": "small is [b]good"}}
    make_console(file=file, width=120).print(ending_box(Path("runs/mine"), summary))
    text = file.getvalue()
    for part in ("mine is finished", "small is [b]good", "0.810", "runs/mine/students/tiny"):
        assert part in text, part
    assert text.count("next: distill ") == 3


def test_page__is_markdown_that_no_name_breaks() -> None:
    name = "a|b`c<script>[x](y)\n# d"
    summary = {
        "students": {name: {"knn": 0.5, "steps": 3, "loss": None}},
        "conclusion": {"text": name, "next": "train longer"},
        "knn_reason": name,
    }
    text = ending_page(Path("runs/mine"), summary)
    assert "| a?b?c?script??x?(y) # d | 0.500 | - | - |" in text
    assert "<" not in text and text.count("```") == 2 and "train longer" in text
    assert "distill report runs/mine " in text


@pytest.mark.parametrize("live", [True, False])
def test_log__holds_what_the_screen_showed(tmp_path: Path, live: bool) -> None:
    run = write_run(tmp_path / "mine")
    (run / LOG).write_text("of an earlier start\n")
    file = io.StringIO()
    console = Console(file=file, force_terminal=live, width=200, color_system=None)
    watch(run, live=live, console=console, stop=threading.Event(), logs=True)
    lines = (run / LOG).read_text().splitlines()
    assert lines[0] == "of an earlier start"
    assert sum("finished after" in line for line in lines) == 1
    for line in lines[1:]:
        assert live or line in file.getvalue()
    assert [line for line in lines if line.startswith("next: distill compare")]
    assert "next: distill compare" in file.getvalue()


def test_log__is_the_launchers_alone_and_may_not_cost_the_run(tmp_path: Path) -> None:
    StatusFile(tmp_path).write(replace(STATUS, state="stopped", message="\x1b[2J"))
    quiet = make_console(file=io.StringIO())
    watch(tmp_path, live=False, console=quiet, stop=threading.Event())
    assert not (tmp_path / LOG).exists()
    watch(tmp_path, live=False, console=quiet, stop=threading.Event(), logs=True)
    assert "stopped: \\x1b[2J" in (tmp_path / LOG).read_text()
    (tmp_path / LOG).unlink()
    (tmp_path / LOG).mkdir()
    last = watch(tmp_path, live=False, console=quiet, stop=threading.Event(), logs=True)
    assert last is not None and last.state == "stopped"
