import shutil
from pathlib import Path

import pytest
import torch

from distill.data.index import ImageIndex
from distill.errors import UserError
from distill.evaluate.files import evaluate_files
from distill.evaluate.scoring import Wanted
from tests.support.scored_run import CPU, write_run, write_splits

KNN = Wanted(("knn",))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two students; its images lie in ``images/train`` and ``images/held_out``."""
    folder = tmp_path_factory.mktemp("run")
    splits: tuple[ImageIndex, ImageIndex] = write_splits(folder / "images", (8, 12))
    return write_run(folder, splits)


def test_evaluate_files__folders_and_files_on_any_labelled_images(run: Path) -> None:
    vit, conv = (run / "students" / name for name in ("vit", "conv"))
    lines: list[str] = []
    bare = shutil.copytree(vit, run / "bare")
    (bare / "preprocessor_config.json").unlink()
    source = run / "images" / "held_out"
    paths = [vit, conv, bare / "model.safetensors"]
    summary = evaluate_files(paths, source, KNN, lines.append, device=CPU)
    assert summary["images"] == {"train": 30, "held_out": 6}  # a fifth of each class
    assert summary["students"].keys() == summary["scores"].keys() == {"vit", "conv", "model"}
    assert summary["scores"]["vit"]["knn"]["value"] == summary["students"]["vit"]["knn"]
    assert "model: 224 px, and mean and std of ImageNet where none are stated" in lines
    reason = summary["agreement"]["reason"]
    assert "6 images are too few to compare neighbours" in reason
    assert summary["conclusion"]["networks"].keys() == {"vit", "conv", "model"}


def test_evaluate_files__agreement_alone_wants_no_labels(run: Path, tmp_path: Path) -> None:
    for path in (run / "images" / "held_out").glob("*/*.png"):
        shutil.copy(path, tmp_path / f"{path.parent.name}-{path.name}")
    paths = [run / "teacher", run / "students" / "vit"]
    summary = evaluate_files(paths, tmp_path, KNN, lambda _: None, device=CPU)
    assert summary["knn_reason"] == "the images have no labels, so k-NN has no classes to vote"
    assert summary["images"] == {"train": 0, "images": 36} and summary["scores"] == {}
    assert summary["agreement"]["networks"]["vit"]["class"]["mutual_knn"] == 1.0


def test_evaluate_files__two_networks_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run / "students" / "vit", tmp_path / "vit")
    source = run / "images" / "held_out"
    paths = [run / "students" / "vit", other]
    summary = evaluate_files(paths, source, Wanted(), lambda _: None, device=CPU)
    assert list(summary["students"]) == [str(path) for path in paths]


def test_evaluate_files__images_of_one_class(run: Path) -> None:
    source = run / "images" / "held_out" / "red"
    summary = evaluate_files([run / "teacher"], source, KNN, lambda _: None, device=CPU)
    assert "no labels" in summary["knn_reason"] and summary["students"]["teacher"]["knn"] is None


def test_evaluate_files__weights_that_cannot_be_read(run: Path) -> None:
    torch.save({"a": torch.zeros(2)}, run / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth"):
        evaluate_files([run / "other.pth"], run / "images", KNN, lambda _: None, device=CPU)
