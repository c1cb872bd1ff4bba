"""Nothing that a run folder, a file name or a recipe holds reaches the terminal as a control character."""

import ast
import io
import json
import logging
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from distill.errors import DataError
from distill.runfolder.events import Event, note
from distill.runfolder.metrics import MetricsWriter
from distill.runfolder.status import NetworkStatus, StatusFile, write_json
from distill.screen.console import escaped_output, make_console, printable
from distill.screen.tables import scores_table
from distill.screen.watch import watch
from distill.screen.words import time_of_day
from tests.support.command import Run
from tests.support.status import ROW, STATUS

ROOT = Path(__file__).parent.parent
CLIPBOARD = "\x1b]52;c;ZXZpbA==\x07"  # writes the clipboard
HOSTILE = f"[red]x{CLIPBOARD}\x9b31m\x1b[2J\x00\x7f\x85\r\u202e\udcff"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")
STYLE = re.compile("\x1b\\[[0-9;]*m")  # of rich
CURSOR = re.compile("\x1b\\[([0-9]*[AK]|\\?25[lh])|\r")  # of rich's live screen


def assert_harmless(text: str) -> None:
    found = CONTROL.search(text)
    assert found is None, repr(text[max(0, found.start() - 40) : found.start() + 20])


def write_hostile_run(run: Path, state: Any) -> None:
    """A run folder of somebody else, every text of it hostile."""
    run.mkdir()
    name = HOSTILE.replace("\x00", "").replace("\udcff", "")
    (run / "job.json").write_text("{}")
    phase = replace(STATUS.phases[-1], name=HOSTILE, networks=(name,))
    saved = STATUS.last_checkpoint
    assert saved is not None
    status = replace(
        STATUS,
        state=state,
        phases=(phase,),
        phase=HOSTILE,
        networks={name: NetworkStatus((0,), "training")},
        last_checkpoint=replace(saved, path=HOSTILE, phase=HOSTILE),
        message=HOSTILE,
        resume_command=HOSTILE,
    )
    StatusFile(run).write(status)
    with MetricsWriter(run, name) as writer:
        writer.write(replace(ROW, phase=HOSTILE, terms={HOSTILE: 1.0}))
    note(run, Event("skipped", HOSTILE, HOSTILE))
    (run / "failure.json").write_text(json.dumps({"message": HOSTILE, "fix": HOSTILE}))
    parked = {"step": HOSTILE, "reason": HOSTILE}
    students = {HOSTILE: {"loss": 1.0, "knn": 0.5, "steps": 3, "parked": parked}}
    write_json(run / "summary.json", {"students": students, "knn_reason": HOSTILE})


@pytest.mark.parametrize("state", ["training", "finished", "failed"])
@pytest.mark.parametrize("is_live", [False, True])
def test_watch__of_a_hostile_run_folder(tmp_path: Path, state: str, *, is_live: bool) -> None:
    run = tmp_path / HOSTILE.replace("\x00", "")
    write_hostile_run(run, state)
    file, stop = io.StringIO(), threading.Event()
    stop.set()
    console = make_console(
        file=file, force_terminal=is_live, width=200, color_system="truecolor" if is_live else None
    )
    watch(run, live=is_live, console=console, stop=stop, hint=HOSTILE)
    text = file.getvalue()
    assert (r"\x1b]52;c;ZXZpbA==" in text) and "[red]x" in text and r"\x9b31m" in text
    assert ("\x1b[" in text) == is_live
    assert_harmless(CURSOR.sub("", STYLE.sub("", text)) if is_live else text)


def test_watch__what_follows_a_line_is_not_taken_for_the_runs(tmp_path: Path) -> None:
    StatusFile(tmp_path).write(replace(STATUS, state="failed", message="bad\n12:00:00  finished"))
    file = io.StringIO()
    watch(tmp_path, live=False, console=make_console(file=file), stop=threading.Event())
    stamp = time_of_day(STATUS.updated_unix, time.time())
    indent = " " * (len(stamp) + 2)
    assert f"{stamp}  failed: bad\n{indent}12:00:00  finished\n" in file.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_console__escapes_every_kind_of_text_and_takes_none_for_markup(
    *, is_terminal: bool
) -> None:
    file = io.StringIO()
    console = make_console(
        file=file, force_terminal=is_terminal, width=120, color_system=None, legacy_windows=False
    )
    table = Table(title=HOSTILE, caption=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE, style="red")
    table.add_row(Text(HOSTILE, style="bold"))
    console.print(table, HOSTILE, Text(HOSTILE), Panel(HOSTILE, title=Text(HOSTILE)))
    console.print(scores_table({"students": {HOSTILE: {"knn": 0.5}}, "knn_reason": HOSTILE}))
    assert_harmless(file.getvalue())
    rows = [line for line in file.getvalue().splitlines() if "[red]x" in line]
    assert len(rows) >= 9 and all(r"\x1b]52" in row for row in rows)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 120, "it was laid out as it is shown"


def test_streams__escape_whatever_else_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with escaped_output():
        warning = logging.LogRecord("distill", logging.WARNING, "", 1, HOSTILE, None, None)
        logging.StreamHandler().emit(warning)
        sys.stderr.writelines([f"{HOSTILE}\x1b[31m\n"])
        sys.stdout.write(f"{HOSTILE}\x1b[31mred\x1b[0m\n")
        assert not sys.stderr.isatty()
    out, err = capsys.readouterr()
    assert_harmless(err)
    assert_harmless(STYLE.sub("", out))
    assert err.count(r"\x1b]52") >= 2 and r"\x1b]52" in out and "\x1b[31mred" in out


def test_printable__keeps_what_can_be_shown() -> None:
    text = "k-NN 0.9 ▁▂ é 1 000\tx\n"
    assert printable(text) == text
    assert printable(printable("\x1b\x85")) == printable("\x1b\x85") == r"\x1b\x85"
    assert printable("\udcff\u2028\ud800") == r"\xff\u2028\ud800"


def test_commands__show_hostile_names_escaped(
    distill: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = HOSTILE.replace("\x00", "").replace("/", "")
    folder = tmp_path / name
    folder.mkdir()
    for broken in (f"a{CLIPBOARD.replace('/', '')}.jpg", "[red]b.jpg"):
        (folder / broken).write_bytes(b"no picture")
    recipe = folder / "r.yaml"
    recipe.write_text("name: x\nstudents: [vits16]\n# fine\n")
    run = tmp_path / "run"
    write_hostile_run(run, "finished")
    commands: list[tuple[object, ...]] = [
        ("data", "check", folder),
        ("check", recipe),
        ("train", "quickstart", "--data", folder, "--out", folder / "out"),
        ("watch", run, "--plain"),
        ("watch", run, name),  # as a pattern of the shell gives it
        ("watch", folder),
        ("eval", folder, "--debug"),
        ("recipes", "show", recipe),
        ("weights", "inspect", folder / "a"),
        ("export", folder, "--to", name),
        ("explain", name),
        ("data", "pack", folder, folder / "out"),
    ]
    for words in commands:
        code, out, err = distill(*words)
        assert_harmless(out + err)
        assert code != 0 or words[0] in {"recipes", "watch", "data"}, words
        if words[:2] == ("data", "check"):
            assert "[red]b.jpg" in out

    def fail(*_: object, **__: object) -> None:
        raise DataError(HOSTILE, fix=HOSTILE)

    monkeypatch.setattr("distill.job.prepare.check_data", fail)
    for words in (("check", "quickstart"), ("check", "quickstart", "--debug")):
        code, _, err = distill(*words)
        assert code == 2 and r"Fix: [red]x\x1b]52;c;ZXZpbA==\x07" in err
        assert_harmless(err)


def test_output__goes_through_one_module() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "distill").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "Console", "rich.print", "rich.console.Console")
    ]
    assert not found, "make_console() and say() escape; these do not"
