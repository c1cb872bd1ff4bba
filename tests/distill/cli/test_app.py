"""The command line as a person meets it: exit codes, messages, start-up."""

import errno
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from distill.cli.app import main
from distill.engine.finding import Finding
from distill.errors import DataError, SetupError, UserError
from distill.job import prepare
from distill.launch import doctor
from distill.launch import local as launch
from distill.launch.local import Options
from distill.recipe.reader import load_job
from distill.recipe.recipe_copy import copy_recipe
from distill.report import summary as finish
from tests.support.command import Result, Run
from tests.support.scored_run import write_run, write_splits


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_help__imports_nothing_heavy() -> None:
    code = (
        "import sys, distill.cli.app\n"
        "try: distill.cli.app.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'deepspeed', 'nvidia', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_plan__imports_no_torch() -> None:
    """Planning is arithmetic: nine students on 4,096 ranks in a second of one core."""
    code = (
        "import sys, distill.cli.app\n"
        "words = ['plan', 'family_all', 'schedule.batch=8192', 'stages=null', '--ranks', '4096', '--json', '--device', 'h100']\n"
        "try: distill.cli.app.main(words)\n"
        "except SystemExit as ended: assert not ended.code\n"
        "heavy = {'torch', 'deepspeed', 'nvidia', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_check__a_good_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", "quickstart")
    assert (
        code == 0
        and "builtin:photographs: 19 images" in out
        and "valid for 2 ranks on this CPU (dry run)" in out
    )


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
        (("train", "quickstart", "--data", "/nowhere"), 2, "--data /nowhere: not a folder"),
        (
            ("check", "quickstart", "data.sources=[{path: /nowhere}]"),
            2,
            "'/nowhere' is not there or no source of images",
        ),
        (("plan", "quickstart", "--ranks", "100"), 2, "teacher: 100 ranks for a batch of"),
        (
            ("plan", "quickstart", "students.0.ranks=5"),
            2,
            "students.small.ranks = 5: this job has 2 ranks",
        ),
        (("pretrain", "quickstart"), 2, "a family recipe has no stages"),
        (("eval", "/nowhere"), 2, "/nowhere: not a run folder"),
        (("watch", "/nowhere"), 2, "/nowhere: not a run folder"),
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
    taught = sum(count * share for count, share in plan["shares"])
    assert taught == pytest.approx(plan["images_global"], rel=1e-4) and plan["notes"]
    assert plan["utilisation"] >= plan["utilisation_even_barrier"]
    wanted = {"memory_gib_max", "exchange_bytes_max", "exchange_bytes_all_gather", "step_s"}
    assert wanted | {"images_per_s", "gain", "gain_bound", "days"} <= plan.keys()


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


# The rest runs in this process; the launcher is replaced, because nothing here is to train.

H100 = ("--device", "h100")
VERBS = ("train", "pretrain", "watch", "check", "plan", "eval", "doctor", "recipes")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], Options]]:
    """What the launcher was asked for; nothing is trained, a summary is written."""
    calls: list[tuple[str, list[str], Options]] = []

    def run(recipe: str, overrides: list[str], options: Options) -> int:
        calls.append((recipe, overrides, options))
        folder = options.out / (options.name or load_job(recipe, overrides)[0].name)
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text('{"images_per_s": 5.0}')
        sys.stdout.write("step 1\n")
        return 0

    monkeypatch.setattr(launch, "run", run)
    return calls


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for kind in ("cat", "dog"):
        (folder / kind).mkdir(parents=True)
        Image.new("RGB", (70, 80), (90, 40, 10)).save(folder / kind / "one.png")
    return folder


def fails_with(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("verb", VERBS)
def test_help__of_each_verb(distill: Run, verb: str) -> None:
    result = distill(verb, "--help")
    assert result.code == 0
    assert "--help" in result.out


def test_help__says_how_to_override(distill: Run) -> None:
    text = " ".join(distill("train", "--help").out.replace("│", " ").split())
    assert "schedule.batch=32" in text
    assert "teacher:KEY=VALUE" in text


@pytest.mark.parametrize(
    "words",
    [("trian",), ("train",), ("train", "quickstart", "--gpus", "0"), ("check", "x", "--no")],
)
def test_usage__mistakes_end_with_2(distill: Run, words: tuple[str, ...]) -> None:
    result = distill(*words)
    assert result.code == 2
    assert "Traceback" not in result.err


def test_check__networks_images_lengths_time_and_memory(distill: Run) -> None:
    result = distill("check", "quickstart")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[:3] == [
        "quickstart: small, gated, convnext from quickstart-teacher",
        "  students learn through the heads that the teacher is trained with",
        "  builtin:photographs: 19 images",
    ]
    phase = r"  {}: {} steps of 64 images, about [^,]+, \d\.\d GiB a rank"
    names = {"base": 600, "gram": 80, "family": 500}
    for line, (name, steps) in zip(lines[3:6], names.items(), strict=True):
        assert re.fullmatch(phase.format(name, steps), line), line
    assert re.search(r"about .* in all \(an estimate: this CPU at 50% of .*timed now\)", lines[6])
    assert lines[-1] == "valid for 2 ranks on this CPU (dry run)."
    assert [line for line in lines if "cores" not in line and line.startswith("warning")] == []


def test_check__a_teacher_recipe_as_json(distill: Run) -> None:
    found = json.loads(distill("check", "quickstart_teacher", "--json").out)
    assert (found["recipe"], found["networks"]) == ("quickstart-teacher", ["a teacher"])
    assert found["plan"]["num_ranks"] == found["ranks"]


def test_check__own_images(distill: Run, images: Path) -> None:
    result = distill("check", "quickstart", "--data", images, "--json")
    assert json.loads(result.out)["sources"] == {str(images): 2}


def test_check__every_problem_of_recipe_teacher_and_data(distill: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    mine = copy_recipe("quickstart", tmp_path / "mine.yaml")[0]
    result = distill(
        "check", mine, "schedule.emma=1", "teacher:seed=x", "--data", tmp_path / "empty"
    )
    assert (result.code, result.out) == (2, "")
    assert (
        "override 'schedule.emma': unknown key 'schedule.emma' - did you mean 'ema'?" in result.err
    )
    assert "override 'seed': Input should be a valid integer" in result.err
    assert "override 'data.sources.0.path': " in result.err
    assert "holds no image" in result.err
    assert result.err.splitlines()[-1].startswith("Fix: ")
    assert "Traceback" not in result.err


def test_check__names_line_and_column(distill: Run, tmp_path: Path) -> None:
    mine = copy_recipe("quickstart_teacher", tmp_path / "mine.yaml")[0]
    text = mine.read_text()
    mine.write_text(text + "emma: 0.9\n")
    result = distill("check", mine)
    line = len(text.splitlines()) + 1
    assert result.code == 2
    assert result.err.startswith(f"{mine}:{line}:1: unknown key 'emma'")


def test_check__broken_data_is_a_wrong_recipe(
    distill: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        prepare, "check_data", fails_with(DataError("a.png: broken", fix="Remove it."))
    )
    result = distill("check", "quickstart")
    assert (result.code, result.err) == (2, "a.png: broken\nFix: Remove it.\n")


def test_check__a_number_of_ranks_that_cannot_work(distill: Run) -> None:
    result = distill("check", "quickstart", "--gpus", "3000")
    assert result.code == 2
    assert "3000 ranks for a batch of" in result.err
    assert "Fix: " in result.err


def test_plan__needs_no_gpu_and_trains_nothing(distill: Run) -> None:
    plan = json.loads(distill("plan", "quickstart", "--ranks", "3", "--json").out)
    assert plan["num_ranks"] == 3
    shown = distill("plan", "quickstart", "--ranks", "3").out
    assert all(name in shown for name in ("small", "gated", "convnext", "teaching"))


def test_plan__the_reported_launch(distill: Run) -> None:
    """48/48/80/120 of 296 ranks, batch 1920: METHOD section 5."""
    plan = json.loads(distill("plan", "family_reported", "--ranks", "296", *H100, "--json").out)
    assert list(plan["ranks"].values()) == [48, 48, 80, 120]
    assert plan["utilisation_even_barrier"] == pytest.approx(0.851, abs=0.004)
    assert plan["utilisation"] == pytest.approx(0.978, abs=0.002)  # full images in a group
    assert plan["exchange_bytes_max"] < 32e6
    assert plan["exchange_bytes_all_gather"] > 3.4e9
    assert plan["memory_gib_max"] < 80
    shown = distill("plan", "family_reported", "--ranks", "296", *H100).out
    assert "busy 98%" in shown


def test_plan__ranks_as_the_recipe_says_them(distill: Run) -> None:
    given = [f"students.{i}.ranks={ranks}" for i, ranks in enumerate(("0-1", "1-2", "4-5"))]
    plan = json.loads(distill("plan", "quickstart", *given, "--ranks", "8", "--json").out)
    assert list(plan["placements"].values()) == [[0, 2], [1, 3], [4, 6]]
    assert plan["notes"] == ["3 ranks only teach", "1 ranks hold several students"]
    result = distill("plan", "quickstart", *given, "--ranks", "4")
    assert (result.code, result.err.splitlines()[0]) == (
        2,
        "students.convnext.ranks = 4-5: this job has ranks 0-3",
    )


@pytest.mark.parametrize(
    ("words", "gated_begins"),
    [
        (("--ranks", "12"), 8),  # groups of 6 and 2 fill a node of 8
        (("--ranks", "12", "engine.ranks_per_node=8"), 8),
        (("--ranks", "12", "engine.ranks_per_node=12"), 6),
        (("engine.processes=12",), 6),  # all on this machine
        (("engine.processes=12", "engine.ranks_per_node=8"), 8),
    ],
)
def test_plan__groups_stay_within_nodes(
    words: tuple[str, ...], gated_begins: int, distill: Run
) -> None:
    ranks = ("students.0.ranks=6", "students.1.ranks=4", "students.2.ranks=2")
    printed = distill("plan", "quickstart", "--device", "cpu", "--json", *ranks, *words)
    assert json.loads(printed.out)["placements"]["gated"] == [gated_begins, gated_begins + 4]


def test_plan__memory_by_part_and_by_rank(distill: Run) -> None:
    plan = json.loads(distill("plan", "family_vit", "--ranks", "8", *H100, "--json").out)
    parts = plan["memory_gib"]
    assert {"teacher", "weights", "optimizer", "ema", "activations", "logits"} < parts.keys()
    assert parts["optimizer"] == pytest.approx(3 * parts["ema"], abs=0.01)
    assert sum(parts.values()) == pytest.approx(plan["memory_gib_max"], abs=0.01)
    runs = plan["memory_gib_ranks"]
    assert sum(count for count, _ in runs) == 8
    assert max(gib for _, gib in runs) == plan["memory_gib_max"]


def test_plan__eight_ranks_are_balanced(distill: Run) -> None:
    result = distill("plan", "family_vit", "--ranks", "8", "--device", "h200", "--json")
    plan = json.loads(result.out)
    assert list(plan["ranks"].values()) == [1, 1, 1, 2, 3]
    assert plan["utilisation"] > 0.997
    assert plan["gain"] == pytest.approx(2.92, rel=0.01)


def test_plan__says_what_does_not_fit(distill: Run) -> None:
    result = distill("plan", "family_vit", "engine.micro_batch=null", "--ranks", "8", *H100)
    assert result.code == 2
    assert "GiB (activations" in result.err and "h100 has 80" in result.err
    assert "engine.micro_batch=" in result.err
    result = distill("plan", "family_vit", "--device", "tpu")
    assert (result.code, result.err.splitlines()[0]) == (2, "--device tpu: not known")


def test_plan__a_missing_teacher_is_only_planned_for(distill: Run) -> None:
    assert distill("check", "family_reported", "--gpus", "296").code == 2
    assert distill("plan", "family_reported", "--ranks", "296", *H100).code == 0


def test_train__passes_options_and_overrides_in_any_order(
    distill: Run, tmp_path: Path, launched: list[tuple[str, list[str], Options]]
) -> None:
    words = (
        "schedule.batch=32",
        "--gpus",
        "1",
        "teacher:seed=1",
        "--name",
        "x",
        "--fresh",
        "--out",
    )
    assert distill("train", "quickstart", *words, tmp_path).code == 0
    options = Options(processes=1, out=tmp_path, name="x", fresh=True, plain=False)
    assert launched == [("quickstart", ["schedule.batch=32", "teacher:seed=1"], options)]


def test_train__own_images_for_teacher_and_family(
    distill: Run, tmp_path: Path, images: Path, launched: list[tuple[str, list[str], Options]]
) -> None:
    assert distill("train", "quickstart", "--data", images, "--out", tmp_path).code == 0
    family, teacher = load_job("quickstart", launched[0][1])
    assert teacher is not None
    assert family.data.sources == teacher.data.sources
    assert family.data.sources[0].path == str(images)


def test_train__own_images_of_an_awkward_name(
    distill: Run, tmp_path: Path, launched: list[tuple[str, list[str], Options]]
) -> None:
    folder = tmp_path / "my 'best' {images}, #1"
    folder.mkdir()
    assert distill("train", "quickstart_teacher", "--data", folder, "--out", tmp_path).code == 0
    recipe, _ = load_job("quickstart_teacher", launched[0][1])
    assert recipe.data.sources[0].path == str(folder)


def test_train__json_is_all_of_standard_output(
    distill: Run, tmp_path: Path, launched: list[tuple[str, list[str], Options]]
) -> None:
    result = distill("train", "quickstart", "--json", "--out", tmp_path)
    assert json.loads(result.out) == {
        "run": str(tmp_path / "quickstart"),
        "exit_code": 0,
        "summary": {"images_per_s": 5.0},
    }
    assert result.err == "step 1\n"
    assert launched[0][2].plain


def test_train__json_comes_from_rank_0_alone(
    distill: Run,
    tmp_path: Path,
    launched: list[tuple[str, list[str], Options]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert distill("train", "quickstart", "--json", "--out", tmp_path).out == ""
    assert len(launched) == 1


def test_train__the_launchers_exit_code_is_ours(
    distill: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "run", lambda *_: 130)
    assert distill("train", "quickstart").code == 130


def test_train__an_error_with_a_message(distill: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        launch, "run", fails_with(SetupError("no device", fix="Write `device: cpu`."))
    )
    assert distill("train", "quickstart") == Result(3, "", "no device\nFix: Write `device: cpu`.\n")
    with_trace = distill("train", "quickstart", "--debug")
    assert with_trace.code == 3
    assert "Traceback" in with_trace.err
    assert with_trace.err.endswith("no device\nFix: Write `device: cpu`.\n")


def test_train__an_error_nobody_foresaw(distill: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "run", fails_with(PermissionError("runs: not allowed\nmore")))
    result = distill("train", "quickstart")
    assert result.code == 1
    first, fix = result.err.splitlines()
    assert first == "PermissionError: runs: not allowed"
    assert fix.startswith("Fix: Run the same command with --debug")
    assert "Traceback" in distill("train", "quickstart", "--debug").err


def test_train__a_full_disk(distill: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "runs/plan.json")
    monkeypatch.setattr(launch, "run", fails_with(full))
    told = "runs/plan.json: No space left on device\nFix: Make room and run the same command again; what was saved is kept.\n"
    assert distill("train", "quickstart") == Result(1, "", told)


def test_pretrain__takes_teacher_recipes(
    distill: Run, tmp_path: Path, launched: list[tuple[str, list[str], Options]]
) -> None:
    assert distill("pretrain", "quickstart_teacher", "--out", tmp_path).code == 0
    assert launched[0][0] == "quickstart_teacher"
    result = distill("pretrain", "quickstart", "--out", tmp_path)
    assert result.code == 2
    assert "a family recipe has no stages to pretrain" in result.err
    assert "Fix: Use distill train quickstart." in result.err
    assert len(launched) == 1


def test_eval__scores_as_json_and_as_table(
    distill: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(run: Path, *_: object) -> dict[str, Any]:
        sys.stdout.write("scoring\n")
        return {"teacher": {"knn": 0.9}, "students": {}, "baselines": {}}

    (tmp_path / "job.json").touch()
    monkeypatch.setattr(finish, "finish", scores)
    assert json.loads(distill("eval", tmp_path, "--json").out)["teacher"] == {"knn": 0.9}
    assert "0.900" in distill("eval", tmp_path).out


def test_eval__an_unknown_task_is_one_line_and_the_rest_is_scored(
    distill: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[str, ...]] = []

    def scores(run: Path, wanted: Any) -> dict[str, Any]:
        chosen.append(wanted.tasks)
        return {"teacher": {"knn": 0.9}, "students": {}, "baselines": {}}

    (tmp_path / "job.json").touch()
    monkeypatch.setattr(finish, "finish", scores)
    ended = distill("eval", tmp_path, "--tasks", "retrieval,segg,knn")
    assert (ended.code, chosen) == (2, [("knn", "retrieval")]) and "0.900" in ended.out
    (line,) = ended.err.splitlines()
    assert line.startswith("--tasks segg: not known, there are agreement, cost, knn, logistic")
    for words, message in (
        (("--tasks", "segg"), "--tasks segg: not known"),
        (("--protocol", "dinov4"), "--protocol dinov4: not known"),
        (("--precision", "fp8"), "--precision fp8: not known"),
    ):
        ended = distill("eval", tmp_path, *words)
        assert ended.code == 2 and ended.err.startswith(message) and len(chosen) == 1


def test_eval__of_several_runs_one_that_is_not_finished_is_named(
    distill: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(run: Path, *_: object) -> dict[str, Any]:
        if run.name == "half":
            raise UserError("half: the run has not finished", fix="Let it finish.")
        return {"teacher": {"knn": 0.9}, "students": {}, "baselines": {}}

    for name in ("half", "done"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "job.json").touch()
    monkeypatch.setattr(finish, "finish", scores)
    ended = distill("eval", tmp_path / "half", tmp_path / "done")
    assert ended.code == 1 and "0.900" in ended.out
    assert ended.err == "half: the run has not finished\nFix: Let it finish.\n"
    ended = distill("eval", tmp_path / "half", tmp_path / "done", "--json")
    assert json.loads(ended.out).keys() == {str(tmp_path / "done")}


def test_eval__weights_without_images_name_the_way_to_score_them(
    distill: Run, tmp_path: Path
) -> None:
    ended = distill("eval", tmp_path)
    assert ended.code == 2 and ended.err == (
        f"{tmp_path}: not a run folder\n"
        "Fix: Give a run folder, or score weights on your images: --data FOLDER.\n"
    )
    assert distill("eval").err.startswith("distill eval: nothing to score\nFix: ")
    ended = distill("eval", tmp_path / "none", "--data", tmp_path)
    assert ended.code == 2 and ended.err.startswith(f"{tmp_path / 'none'}: no such file")


def test_eval__weights_on_images(distill: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path, write_splits(tmp_path / "images", (4, 6)))
    words = ("eval", run / "students" / "vit", "--data", tmp_path / "images" / "train")
    ended = distill(*words, "--json")
    assert ended.code == 0, ended.err
    summary = json.loads(ended.out)
    assert summary["students"]["vit"]["knn"] == summary["scores"]["vit"]["knn"]["value"]
    shown = distill(*words).out
    assert f"{summary['students']['vit']['knn']:.3f}" in shown and "next:" in shown


def test_watch__json_is_the_status_file(distill: Run, tmp_path: Path) -> None:
    (tmp_path / "job.json").touch()
    assert json.loads(distill("watch", tmp_path, "--json").out) is None
    (tmp_path / "status.json").write_text('{"state": "training"}')
    assert json.loads(distill("watch", tmp_path, "--json").out) == {"state": "training"}


def test_watch__ctrl_c_only_leaves(
    distill: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "job.json").touch()
    monkeypatch.setattr("distill.screen.watch.watch", interrupted)
    assert distill("watch", tmp_path).code == 0


def test_doctor__exit_code_and_fix(distill: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = (
        Finding("torch", "2.13", is_ok=True),
        Finding("disk", "0 GiB", False, "Free some [space]."),
    )
    monkeypatch.setattr(doctor, "examine", lambda: [good])
    assert distill("doctor") == Result(0, "ok    torch: 2.13\n", "")
    monkeypatch.setattr(doctor, "examine", lambda: [good, bad])
    result = distill("doctor")
    assert result.code == 3
    assert result.out.splitlines()[1:] == ["FAIL  disk: 0 GiB", "      Fix: Free some [space]."]
    as_json = distill("doctor", "--json")
    assert as_json.code == 3
    assert [each["is_ok"] for each in json.loads(as_json.out)] == [True, False]


def test_module__runs_like_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distill", "check", str(tmp_path / "none.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "no such recipe file or built-in recipe" in ended.stderr
