"""The command line as a person meets it: exit codes, messages, start-up."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.cli import main


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_help__imports_nothing_heavy_and_is_fast() -> None:
    code = (
        "import sys, distill.cli\n"
        "try: distill.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'nvidia', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    assert (
        statistics.median(times) < 1.0
    )  # 0.2 s on an idle machine; this bound only catches a heavy import


def test_check__a_good_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", "quickstart")
    assert code == 0 and "builtin:photographs: 19 images" in out and "good for 2 ranks" in out


def test_check__a_bad_recipe_is_exit_code_2_with_every_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "name: x\nstudents: [vits61]\nteacher: {weights: w}\ndata: {sources: [{path: d}]}\nschedule: {batch: 4, stepz: 3}\n"
    )
    code, _, err = run(capsys, "check", str(path))
    assert code == 2
    assert (
        "did you mean 'vits16'?" in err
        and "unknown key 'schedule.stepz' - did you mean 'steps'?" in err
    )
    assert "Traceback" not in err and err.splitlines()[-1].startswith("Fix: ")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("train", "nothing.yaml"), 2, "no such recipe file or built-in recipe"),
        (("train", "quickstart", "--data", "/nowhere"), 1, "--data /nowhere: not a folder"),
        (("check", "quickstart", "data.sources=[{path: /nowhere}]"), 1, "/nowhere is not a folder"),
        (("plan", "quickstart", "--ranks", "100"), 2, "teacher: 100 ranks for a batch of"),
        (
            ("plan", "quickstart", "students.0.ranks=5"),
            2,
            "students.small.ranks = 5: this job has 2 ranks",
        ),
        (("pretrain", "quickstart"), 2, "a family recipe has no stages"),
        (("eval", "/nowhere"), 1, "/nowhere: not a run folder"),
        (("watch", "/nowhere"), 1, "/nowhere: not a run folder"),
        (("recipes", "show", "nothing"), 2, "no such recipe"),
    ],
)
def test_verbs__one_clear_line_and_a_fix(
    words: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got, _, err = run(capsys, *words)
    assert got == code and message in err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("Fix: ")


def test_debug__shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "check", "nothing.yaml", "--debug")
    assert code == 2 and "Traceback" in err


def test_usage__unknown_option_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "train", "quickstart", "--gpu", "1")[0] == 2


def test_plan__json_says_who_and_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", "quickstart", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["ranks"] == {"small": 1, "gated": 1, "convnext": 1}
    assert sum(plan["shares"]) == plan["images_global"] and plan["notes"]
    assert plan["utilisation"] >= plan["utilisation_even"]


def test_recipes__list_show_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {"quickstart", "quickstart_teacher"} <= json.loads(
        run(capsys, "recipes", "list", "--json")[1]
    ).keys()
    assert run(capsys, "recipes", "show", "quickstart")[1].startswith("# ")
    code, out, _ = run(capsys, "recipes", "copy", "quickstart", str(tmp_path / "my.yaml"))
    assert code == 0 and (tmp_path / "quickstart_teacher.yaml").is_file() and "my.yaml" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--version")
    assert code == 0 and out.startswith("distill 0.")
