"""Teachers from elsewhere: their normalisation is the run's, and whatever is accepted is scored."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill.errors import CheckpointError
from distill.export.save import ExportFacts, write_backbone
from distill.job.stored_recipes import load_from_here
from distill.plan.job import check_job
from distill.plan.teacher_source import describe_teacher
from distill.recipe.reader import load_job
from teacher.shapes import ViTSpec
from tests.support.jobs import FAMILY, run_distill, write_images
from tests.support.weights import random_weights, translate

SPEC = ViTSpec(width=16, depth=1, heads=2, ffn_width=32, patch=8)
MEAN, STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)
IMAGENET = (0.485, 0.456, 0.406)


def teacher_in(folder: Path, kind: str) -> Path:
    """A teacher of random weights: a folder with or without its preprocessor, or a file."""
    weights = {name: 0.1 * tensor for name, tensor in random_weights(SPEC).items()}
    write_backbone(folder / "given", weights, SPEC, ExportFacts(56, MEAN, STD, {}))
    released = translate(weights, SPEC, "hf", "meta")
    if kind == "folder":
        return folder / "given"
    (folder / "given" / "preprocessor_config.json").unlink()
    if kind == "silent folder":
        return folder / "given"
    (folder / "files").mkdir()
    if kind == ".pth":
        path = folder / "files" / "of.pth"
        torch.save({"model": released, "ema": released}, path)
    elif kind == "satellite":
        path = folder / "files" / "dinov3_x_pretrain_sat493m-0.pth"
        torch.save(released, path)
    else:
        path = folder / "files" / "of.safetensors"
        save_file({name: tensor.clone() for name, tensor in released.items()}, path)
    return path


def recipe_of(folder: Path, weights: Path, data: str = "") -> Path:
    text = FAMILY.replace("{train: teacher.yaml}", f'{{weights: "{weights}", heads: none}}')
    text = text.replace("DATA", str(folder / "images")).replace("STEPS", "4")
    text = text.replace('"}]}', f'"}}]{data}}}').replace("processes: 2", "processes: 1")
    lines = [
        line for line in text.splitlines() if "name: gated" not in line and "name: conv" not in line
    ]
    (folder / "family.yaml").write_text("\n".join(lines))
    return folder / "family.yaml"


@pytest.mark.parametrize(
    ("kind", "mean"),
    [("folder", MEAN), ("satellite", MEAN), ("silent folder", IMAGENET), (".pth", IMAGENET)],
)
def test_load_from_here__a_silent_recipe_takes_the_teachers_normalisation(
    kind: str, mean: tuple[float, ...], tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, teacher_in(tmp_path, kind))
    loaded, _ = load_from_here(str(recipe), ())
    assert loaded.data.mean == mean
    assert (loaded.data.std == STD) == (mean == MEAN)
    lines = describe_teacher(loaded)
    assert any("the teacher's mean [0.43, 0.411, 0.296]" in line for line in lines) == (
        mean == MEAN
    )
    assert any("is taken (teacher or EMA first)" in line for line in lines) == (kind == ".pth")
    explicit = recipe_of(tmp_path, tmp_path / "given", f", mean: {list(MEAN)}, std: {list(STD)}")
    assert load_from_here(str(explicit), ())[0].data.mean == MEAN


def test_check_job__another_normalisation_than_the_teachers_is_refused(tmp_path: Path) -> None:
    weights = teacher_in(tmp_path, "folder")
    recipe = recipe_of(tmp_path, weights, f", mean: {list(IMAGENET)}")
    told = r"data\.mean = \[0\.485, .*: the teacher's preprocessor_config.json has \[0\.43, "
    with pytest.raises(CheckpointError, match=told):
        load_from_here(str(recipe), ())
    with pytest.raises(CheckpointError, match=told):
        check_job(*load_job(str(recipe)), 1)
    near = recipe_of(tmp_path, weights, ", mean: [0.4301, 0.411, 0.296]")
    assert load_from_here(str(near), ())[0].data.mean == (0.4301, 0.411, 0.296)


def test_check_job__a_teacher_of_other_channels_is_refused(tmp_path: Path) -> None:
    spec = ViTSpec(width=16, depth=1, heads=2, ffn_width=32, patch=8, in_channels=4)
    write_backbone(tmp_path / "given", random_weights(spec), spec, ExportFacts(56, MEAN, STD, {}))
    with pytest.raises(CheckpointError, match="takes images of 4 channels, ours have 3"):
        check_job(*load_job(str(recipe_of(tmp_path, tmp_path / "given"))), 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "silent folder", ".pth", ".safetensors"])
def test_train__every_accepted_teacher_is_scored(kind: str, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    recipe = recipe_of(tmp_path, teacher_in(tmp_path, kind))
    ended = run_distill("train", str(recipe), "--out", str(tmp_path / "runs"), "--plain")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = tmp_path / "runs" / "tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert 0.0 <= summary["teacher"]["knn"] <= 1.0
    assert summary["baselines"]["untrained"].keys() == {"teacher", "plain"}
    stated = json.loads((run / "students/plain/preprocessor_config.json").read_text())
    assert stated["image_mean"] == list(MEAN if kind == "folder" else IMAGENET)
    if kind == ".pth":
        assert "'ema.' is taken" in ended.stdout
        again = run_distill("eval", str(run))
        assert again.returncode == 0 and "teacher" in again.stdout, again.stderr
        out = tmp_path / "out"
        words = ["export", str(run), "--to", "hf", "--student", "teacher", "--out", str(out)]
        assert run_distill(*words).returncode == 0
        stated = json.loads((out / "teacher/preprocessor_config.json").read_text())
        assert stated["image_mean"] == list(IMAGENET)
