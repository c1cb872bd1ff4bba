"""``distill export`` as a person meets it: lines, JSON, exit codes, what is left on disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from distill.cli import app as cli
from distill.export import to_hf
from distill.runfolder.parked import Parked, write_parked
from tests.support.custom_nets import forget, write_module, write_student
from tests.support.exports import CONVNEXT, GATED, VIT, names, write_network
from tests.support.scored_run import write_splits

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The run folder of a finished quickstart, as far as the export reads it."""
    run = started(tmp_path / "run")
    for name, spec in {"small": VIT, "gated": GATED, "convnext": CONVNEXT}.items():
        write_network(run / "students" / name, spec)
    write_network(run / "teacher", VIT, seed=1)
    scores: dict[str, Any] = {"teacher": {"knn": 0.9}, "students": {"small": {"knn": 0.75}}}
    scores["baselines"] = {"pixels": 0.3, "colour": 0.6, "untrained": {"small": 0.5}}
    (run / "summary.json").write_text(json.dumps(scores))
    return run


def started(run: Path, recipe: str = "quickstart") -> Path:
    run.mkdir()
    shutil.copy(RECIPES / f"{recipe}.yaml", run / "recipe.resolved.yaml")
    shutil.copy(RECIPES / "quickstart_teacher.yaml", run)
    request = {"resume_command": "distill train quickstart"}
    (run / "job.json").write_text(json.dumps({"request": request}))
    return run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs ``distill export`` through the real entry point; gives exit code, output, errors."""

    def call(*words: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", *map(str, words)])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def test_export__every_student_by_default(run: Any, finished: Path) -> None:
    code, out, _ = run(finished, "--to", "hf")
    assert code == 0
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["convnext", "gated", "small"]
    assert all("patch features by at most" in line for line in lines)
    assert all(f"in transformers {transformers.__version__}" in line for line in lines)
    assert names(finished / "export" / "hf") == {"convnext", "gated", "small"}
    card = (finished / "export" / "hf" / "small" / "README.md").read_text()
    assert "| this network | 0.750 |" in card and "| raw pixels | 0.300 |" in card
    assert "from photographs" in card and str(finished) not in card


def test_export__json_holds_the_figures_and_nothing_else_is_printed(
    run: Any, finished: Path, tmp_path: Path
) -> None:
    words = (finished, "--to", "hf", "--dtype", "bf16", "--student", "teacher")
    code, out, _ = run(*words, "--student", "small", "--out", tmp_path / "out", "--json")
    said = json.loads(out)
    assert code == 0 and (said["to"], said["dtype"]) == ("hf", "bf16")
    assert [each["name"] for each in said["exported"]] == ["teacher", "small"]
    for each in said["exported"]:
        assert 0 <= each["largest_difference"]["patch_tokens"] < each["tolerance"] == 1e-4
        assert Path(each["folder"]).parent == tmp_path / "out"
    assert "Distilled from a frozen" in (tmp_path / "out" / "teacher" / "README.md").read_text()


def test_export__licence_of_the_teacher_goes_along(run: Any, finished: Path) -> None:
    card = finished / "teacher" / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: dinov3-license\n---\n# teacher\n")
    assert run(finished, "--to", "hf", "--student", "small")[0] == 0
    written = (finished / "export" / "hf" / "small" / "README.md").read_text()
    assert "license: other\nlicense_name: dinov3-license\n" in written


def test_export__a_parked_student_says_so(run: Any, finished: Path) -> None:
    record = finished / "students" / "small" / "distill.json"
    facts = {**json.loads(record.read_text()), "steps": 3, "parked": "since step 4: no memory"}
    record.write_text(json.dumps(facts))
    code, out, _ = run(finished, "--to", "hf", "--student", "small")
    assert code == 0 and out.endswith("; parked since step 4: no memory\n")
    folder = finished / "export" / "hf" / "small"
    card = (folder / "README.md").read_text()
    assert ", 3 steps)" in card and "- parked since step 4: no memory\n" in card
    assert json.loads((folder / "distill.json").read_text())["parked"] == facts["parked"]
    write_parked(finished, "never", Parked(0, "no memory"))
    code, _, err = run(finished, "--to", "hf", "--student", "never")
    assert code == 1
    assert "--student never: was never trained, it is parked since step 0: no memory" in err


def test_export__a_teacher_that_is_gone_does_not_keep_students_back(
    run: Any, finished: Path
) -> None:
    shutil.rmtree(finished / "teacher")
    assert run(finished, "--to", "hf", "--student", "small")[0] == 0
    code, _, err = run(finished, "--to", "hf", "--student", "teacher")
    assert code == 1 and f"--student teacher: {finished / 'teacher'} is missing" in err


def test_export__a_wrong_translation_is_exit_code_1(
    run: Any, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = to_hf.convert

    def swapped(source: Path, target: Path, **how: Any) -> None:
        right(source, target, **how)
        weights = load_file(target / "model.safetensors")
        query, key = (f"layer.0.attention.{each}_proj.weight" for each in "qk")
        weights[query], weights[key] = weights[key], weights[query]
        save_file(weights, target / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(to_hf, "convert", swapped)
    code, out, err = run(finished, "--to", "hf", "--student", "small", "--json")
    assert code == 1 and not out
    assert "small as hf: class features differ by at most" in err and "0.0001 is allowed" in err
    assert "Traceback" not in err and err.splitlines()[-1].startswith("Fix: ")
    assert names(finished / "export" / "hf") == {"small.rejected"}


@pytest.mark.parametrize(
    ("words", "code", "message", "fix"),
    [
        (("--student", "smal"), 2, "--student smal: not in ", "did you mean 'small'?"),
        (("--student", "x"), 2, "--student x: not in ", "one of: convnext, gated, small, teacher"),
        (
            ("--to", "onnx"),
            3,
            "--to onnx: onnx and onnxscript not installed",
            "distill-family[onnx]",
        ),
        (("--to", "tflite"), 2, "tflite", "hf"),
        (("--with-head", "svm", "--labels", "."), 2, "--with-head svm: not known", "knn or linear"),
        (("--with-head", "knn"), 2, "--with-head knn: --labels is missing", "--labels SRC"),
        (("--with-head", "knn", "--labels", "gone"), 2, "gone: no such file", "folders"),
        (("--labels", "."), 2, "--labels: --with-head is missing", "--with-head knn"),
        (
            ("--with-head", "knn", "--labels", ".", "--to", "timm"),
            2,
            "--with-head with --to timm: not there",
            "onnx or hf",
        ),
        (
            ("--with-head", "knn", "--labels", ".", "--int8"),
            2,
            "--int8 with --with-head: not there",
            "one of them",
        ),
        (
            ("--with-head", "knn", "--labels", ".", "--protocol", "slow"),
            2,
            "--protocol slow: not known",
            "quick",
        ),
        (("--int8",), 2, "--int8 with --to hf: not there", "--to onnx"),
        (
            ("--to", "onnx", "--int8", "--dtype", "bf16"),
            2,
            "--int8 with --dtype bf16: not there",
            "one of them",
        ),
        (("--calibrate", "."), 2, "--calibrate: --int8 is missing", "Add --int8"),
        (
            ("--with-head", "knn", "--labels", str(RECIPES)),
            1,
            "no image",
            "",
        ),
        (("--dtype", "fp8"), 2, "fp8", "bf16"),
    ],
)
def test_export__one_clear_line(
    words: tuple[str, ...],
    code: int,
    message: str,
    fix: str,
    run: Any,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if words == ("--to", "onnx"):
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    got, out, err = run(finished, "--to", "hf", *words)
    assert got == code and not out
    assert message in err and fix in err and "Traceback" not in err
    assert not (finished / "export").exists()


def test_export__a_custom_student(
    run: Any, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factory = write_module(tmp_path, "cli_nets")
    monkeypatch.chdir(tmp_path)
    write_student(finished / "students" / "mine", factory)
    code, out, _ = run(finished, "--to", "factory", "--student", "mine")
    assert code == 0 and out.startswith("mine: ")
    assert names(finished / "export" / "factory") == {"mine"}
    for words, line in (
        ((finished, "--to", "hf"), "--to hf: mine is a custom student, made by cli_nets:Normed"),
        ((finished, "--to", "factory"), "--to factory: convnext is no custom student"),
        ((finished, "--student", "mine", "--to", "meta"), "Fix: Use --to onnx or factory"),
    ):
        code, out, err = run(*words)
        assert code == 2 and not out and line in err
    assert names(finished / "export") == {"factory"}
    forget(factory)


def test_export__without_a_format(run: Any, finished: Path) -> None:
    code, _, err = run(finished)
    assert code == 2 and err.splitlines()[0].endswith("distill export: no --to")


def test_export__with_a_head_the_score_is_printed_and_in_json(
    run: Any, finished: Path, tmp_path: Path
) -> None:
    write_splits(tmp_path / "images", (16, 1))
    words = (finished, "--to", "hf", "--student", "small", "--with-head", "knn")
    source = tmp_path / "images" / "train"
    code, out, _ = run(*words, "--labels", source, "--json")
    said = json.loads(out)
    assert code == 0 and said["to"] == "hf-knn"
    (done,) = said["exported"]
    assert Path(done["folder"]) == finished / "export" / "hf-knn" / "small"
    assert done["head"]["labels"] == "train" and done["head"]["equal"] == done["head"]["held_out"]
    code, out, _ = run(*words, "--labels", source, "--out", tmp_path / "out")
    score = f"knn (quick) {done['head']['value']:.3f} on 9 held-out images"
    assert code == 0 and score in out.splitlines()[1]
    assert names(tmp_path / "out") == {"hf-knn"}


def test_export__before_there_is_anything_to_export(run: Any, tmp_path: Path) -> None:
    code, _, err = run(tmp_path, "--to", "hf")
    assert code == 2 and f"{tmp_path}: not a run folder" in err
    begun = started(tmp_path / "begun")
    for words in ((), ("--student", "small")):
        code, _, err = run(begun, "--to", "hf", *words)
        assert code == 1 and "has no finished students yet" in err
        assert err.splitlines()[-1] == "Fix: Let the run finish: distill train quickstart"
    pretrained = started(tmp_path / "pretrained", "quickstart_teacher")
    write_network(pretrained / "teacher", VIT)
    code, _, err = run(pretrained, "--to", "hf")
    assert code == 1 and "trained a teacher and no students" in err
    assert err.splitlines()[-1] == "Fix: Add --student teacher."
    assert run(pretrained, "--to", "hf", "--student", "teacher")[0] == 0


def test_export__imports_nothing_heavy() -> None:
    code = "import sys, distill.cli.export; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
