"""Classifiers: their logits are the votes of the protocols, their scores those of ``distill eval``, in the files too."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from safetensors.torch import load_file

from distill.data.index import ImageIndex
from distill.errors import RecipeError, UserError
from distill.evaluate.files import evaluate_files
from distill.evaluate.heads import HEADS, MOST_OTHER, Fitted, fit_head, head_exporters
from distill.evaluate.scoring import Wanted
from distill.export.card import Inputs
from distill.export.export import Exported, export_network
from distill.protocols.knn import knn_votes
from distill.protocols.knn_protocols import weighted_votes
from distill.protocols.linear import fit_probe
from distill.protocols.score import Protocol
from distill.weights.containers import read_object
from tests.support.exports import BACKGROUND, names
from tests.support.samples import overlapping
from tests.support.scored_run import CPU, MEAN, STD, write_run, write_splits

ROOT = Path(__file__).parents[3]
CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder; its images lie in ``images/train`` and ``images/held_out``, 16 of each class."""
    folder = tmp_path_factory.mktemp("run")
    splits: tuple[ImageIndex, ImageIndex] = write_splits(folder / "images", (4, 16))
    return write_run(folder, splits)


@pytest.fixture
def _unchecked_shapes() -> Iterator[None]:
    """The exporter traces with symbolic sizes, which the shape checks of the suite refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def fitted_on(run: Path, kind: str, name: str = "vit", protocol: Protocol = "quick") -> Fitted:
    network = (name, run / "students" / name, None)
    return fit_head(kind, network, run / "images" / "held_out", protocol, lambda _: None)


def written(fitted: Fitted, form: str, folder: Path) -> Exported:
    (exporter,) = head_exporters(fitted, (form,))
    inputs = Inputs(fitted.network.preparation.size, MEAN, STD)
    name, path = fitted.network.name, fitted.network.path
    return export_network(name, path, folder, exporter, "fp32", BACKGROUND, inputs)


@pytest.mark.parametrize("protocol", ["quick", "dinov3"])
def test_knn_head__its_largest_logit_is_the_vote_of_the_protocol(protocol: Protocol) -> None:
    sample = overlapping(300, protocol)
    score, head = HEADS["knn"](sample, CLASSES)
    query = sample.test.class_token
    k = score.settings["k"]
    vote = knn_votes if protocol == "quick" else weighted_votes
    expected = vote(sample.train.class_token, sample.train_labels, query, k)
    logits = head.module(query, query[:, None])
    assert logits.shape == (60, 3) and torch.equal(logits.argmax(1), expected)
    if protocol == "quick":  # votes decide, the voters' similarity breaks ties alone
        assert torch.equal(logits.round().sum(1), torch.full((60,), 5.0, dtype=torch.float64))


def test_linear_head__is_the_probe_that_the_score_is_of() -> None:
    sample = overlapping(90, "quick")
    score, head = HEADS["linear"](sample, CLASSES)
    predicted = head.module(sample.test.class_token, sample.test.mean_patch[:, None]).argmax(1)
    right = predicted == sample.test_labels
    assert torch.equal(right, fit_probe(sample).right)
    assert float(right.double().mean()) == score.value


@pytest.mark.parametrize(("kind", "protocol"), [("knn", "quick"), ("linear", "quick")])
def test_fit_head__its_score_is_the_one_that_eval_prints(
    kind: str, protocol: Protocol, run: Path
) -> None:
    found = fitted_on(run, kind, protocol=protocol).score
    wanted, source = Wanted((kind,), protocol), run / "images" / "held_out"
    paths = [run / "students" / "vit"]
    summary = evaluate_files(paths, source, wanted, lambda _: None, device=CPU)
    assert summary["scores"]["vit"][kind] == {**found.to_json(), **_untrained(summary, kind)}
    if kind == "knn":
        assert found.value == summary["students"]["vit"]["knn"]


def _untrained(summary: dict[str, dict[str, dict[str, dict[str, float]]]], kind: str) -> object:
    entry = summary["scores"]["vit"][kind]
    return {key: entry[key] for key in ("untrained",) if key in entry}


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_head_exporters__a_folder_for_hugging_face_whose_card_runs(
    kind: str, run: Path, tmp_path: Path
) -> None:
    fitted = fitted_on(run, kind, "conv")
    done = written(fitted, "hf", tmp_path / "conv")
    facts = read_object(done.folder / "distill.json")["export"]
    assert facts["format"] == f"hf-{kind}" and facts["head"]["value"] == fitted.score.value
    assert facts["head"]["equal"] == facts["head"]["held_out"] == 9
    assert facts["head"]["value_of_files"] == pytest.approx(fitted.score.value)
    config = read_object(done.folder / "config.json")
    assert config["id2label"] == {"0": "blue", "1": "green", "2": "red"}
    assert set(load_file(done.folder / "classifier.safetensors")) == set(
        fitted.head.module.state_dict()
    )
    assert f"{fitted.score.value:.3f} on 9 held-out images" in done.measured.clause
    card = (done.folder / "README.md").read_text()
    assert "## Classifier" in card and "3 classes: blue, green, red" in card
    assert run_code(code_of(card)[0], tmp_path) in CLASSES


def code_of(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_code(code: str, folder: Path) -> str:
    """What a script prints in a new process that stands in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@pytest.mark.slow
def test_head_exporters__the_scripts_of_the_page_give_the_class(
    run: Path, tmp_path: Path, _unchecked_shapes: None
) -> None:
    pytest.importorskip("onnxruntime")
    place = tmp_path / "runs" / "quickstart" / "export"
    for form, kind in (("onnx", "knn"), ("hf", "linear")):
        fitted = fitted_on(run, kind)
        done = written(fitted, form, place / f"{form}-{kind}" / "small")
        assert done.measured.record["head"]["equal"] == 9
        assert done.measured.record["head"]["value_of_files"] == pytest.approx(fitted.score.value)
    shutil.copy(run / "images" / "held_out" / "green" / "0.png", tmp_path / "photo.png")
    page = (ROOT / "docs" / "export.md").read_text()
    first, second = (code for code in code_of(page) if "small" in code)
    for code in (first, second):
        assert len([line for line in code.splitlines() if line]) <= 10
    said = run_code(first + second, tmp_path).splitlines()
    assert len(said) == 2 and set(said) == {"green"}


def test_head_exporters__files_that_predict_otherwise_are_not_written(
    run: Path, tmp_path: Path
) -> None:
    fitted = fitted_on(run, "linear", "conv")
    fitted.predicted[:] = (fitted.predicted + 1) % 3
    assert MOST_OTHER < 1
    with pytest.raises(UserError, match="9 of 9 held-out predictions are not those of the score"):
        written(fitted, "hf", tmp_path / "out" / "conv")
    assert names(tmp_path) == set()


def test_fit_head__bad_input_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--with-head svm: not known") as failed:
        fitted_on(run, "svm")
    assert failed.value.fix == "Take knn or linear."
    network = ("vit", run / "students" / "vit", None)
    one_class = run / "images" / "held_out" / "red"
    with pytest.raises(UserError, match=r"--labels .*red: the images have no labels"):
        fit_head("knn", network, one_class, "quick", lambda _: None)
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for number in range(4):
            shutil.copy(run / "images" / "held_out" / name / f"{number}.png", tmp_path / name)
    with pytest.raises(UserError, match="9 training images are too few for k-NN with k = 10"):
        fit_head("knn", network, tmp_path, "dinov3", lambda _: None)
