"""``init`` of students and of pretraining from the recipe to the run folder: compared, hashed, stated, gone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill.errors import CheckpointError
from distill.export.licences import licences_in
from distill.export.save import write_backbone
from distill.job.agreement import facts_of
from distill.job.initial import INITIAL, check_inits, with_fingerprints
from distill.job.origin import LICENCES, licence_warning, licences_of_network
from distill.job.prepare import Job, JobRequest, prepare
from distill.job.stored_recipes import load_from_here, read_recipes
from distill.recipe.keys import FamilyRecipe
from distill.recipe.recipe_hash import recipe_hash
from tests.support.command import Run
from tests.support.jobs import run_distill, write_images
from tests.support.weights import FACTS, VIT, folder_of, random_weights

DINO = "# DINOv3 License\n\nThe terms.\n"
FAMILY = """\
name: mine
teacher: {weights: TEACHER, heads: none, licence: mit}
students:
  - {name: one, arch: vit, width: 16, depth: 1, heads: 2, patch: 8, ffn_width: 32, init: START}
  - {name: two, arch: vit, width: 16, depth: 1, heads: 2, patch: 8}
data: {sources: [{path: images}], mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}
crops: {global: {size: 32}, local: {count: 2, size: 16}}
schedule: {batch: 4, steps: 3, lr: {peak: 1.0e-3, warmup: 0}}
engine: {device: cpu, processes: 1, precision: fp32}
checkpoint: {every: 1}
"""


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose first student starts from a folder under DINOv3's licence."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    for name in ("TEACHER", "START"):
        folder = folder_of(tmp_path / name)
        for file in ("README.md", "distill.json"):
            (folder / file).unlink()
    (tmp_path / "START" / "LICENSE.md").write_text(DINO)
    (tmp_path / "mine.yaml").write_text(FAMILY)
    return tmp_path / "mine.yaml"


def prepared(recipe: Path, *words: str, fresh: bool = False) -> tuple[Job, list[str]]:
    lines: list[str] = []
    request = JobRequest(str(recipe), words, str(recipe.parent / "run"), "")
    return prepare(request, num_ranks=1, fresh=fresh, say=lines.append), lines


def students_of(job: Job) -> FamilyRecipe:
    assert isinstance(job.recipe, FamilyRecipe)
    return job.recipe


def test_prepare__notes_what_was_found_and_hashes_it(family: Path) -> None:
    job, lines = prepared(family)
    (line,) = (line for line in lines if line.startswith("one: starts from"))
    init = students_of(job).students[0].init
    assert init is not None and init.fingerprint is not None
    assert init.fingerprint[:16] in line and "fresh class_projector (the source has none)" in line
    noted = json.loads((family.parent / "run" / INITIAL).read_text())
    assert noted["one"]["taken"] == ["backbone"] and noted["one"]["fingerprint"] == init.fingerprint
    plain = load_from_here(str(family), ("students.0.init=null",))[0]
    assert isinstance(plain, FamilyRecipe)
    assert recipe_hash(plain.students[0]) != job.networks["one"]
    assert recipe_hash(plain.students[1]) == job.networks["two"]
    moved = shutil.copytree(family.parent / "START", family.parent / "MOVED")
    again, _ = prepared(family, f"students.0.init={moved}")
    assert again.networks == job.networks  # where the files lie does not matter
    weights = random_weights(VIT)
    weights["norm.bias"] += 1.0
    write_backbone(moved, weights, VIT, FACTS)
    changed, _ = prepared(family, f"students.0.init={moved}")
    assert changed.networks["one"] != job.networks["one"]


def test_prepare__a_checksum_that_is_given_must_be_theirs(family: Path) -> None:
    with pytest.raises(CheckpointError, match=r"students\.one\.init\.fingerprint = 12: "):
        prepared(family, "students.0.init.fingerprint='12'")


def test_licences__go_to_the_student_that_starts_from_them(family: Path) -> None:
    prepared(family)
    run = family.parent / "run"
    one, two = (licences_of_network(run, name) for name in ("one", "two"))
    assert [each.identifiers for each in one.terms] == [("mit",), ("dinov3-license",)]
    assert one.texts == {"LICENSE.md": DINO.encode()}
    assert two == licences_in(run / LICENCES) and not two.texts
    prepared(family, "students.0.init=null", fresh=True)
    assert not (run / LICENCES / "one").exists()


def test_check__a_licence_that_contradicts_is_one_line(family: Path, distill: Run) -> None:
    (family.parent / "START" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    ended = distill("check", family)
    assert ended.code == 1
    (line,) = (line for line in ended.err.splitlines() if "licence" in line)
    assert "students.one.init: licence of START: contradicting statements" in line
    with pytest.raises(CheckpointError, match="contradicting"):
        prepared(family)
    assert not (family.parent / "run").exists()


def test_check__an_unknown_licence_is_a_warning_that_names_the_key(family: Path) -> None:
    (family.parent / "START" / "LICENSE.md").unlink()
    warning = licence_warning(*load_from_here(str(family), ()))
    assert warning is not None and "licence of students.one.init unknown: START" in warning
    assert "students.one.init.licence" in warning
    stated = load_from_here(str(family), ("students.0.init={from: START, licence: mit}",))
    assert licence_warning(*stated) is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("students.0.width=32", "ViT of width 16 there, ViT of width 32 in the recipe"),
        ("students.0.depth=2", "ViT of depth 1 there, ViT of depth 2 in the recipe"),
        ("students.0.init={from: START, heads: beside}", "heads = beside: no "),
        ("students.0.init=absent", "absent: no such file or folder, nor RUN:NAME"),
        ("crops.eval_size=36", "36 is not a multiple of 8"),
        ("students.0.init={from: START, freeze_backbone: 3}", "3: it has 3 steps"),
    ],
)
def test_check__finds_it_before_anything_starts(
    word: str, message: str, family: Path, distill: Run
) -> None:
    ended = distill("check", family, word)
    assert ended.code in (1, 2) and message in ended.err, ended
    assert not (family.parent / "run").exists()


def test_with_fingerprints__files_that_are_gone_count_only_with_a_checkpoint(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = prepared(family)
    recipes, run = load_from_here(str(family), ()), family.parent / "run"
    shutil.rmtree(family.parent / "START")
    with pytest.raises(CheckpointError, match="no such file"):
        with_fingerprints(recipes, run, {})
    monkeypatch.setattr("distill.job.initial.checkpoints", lambda _: ["one"])
    (recipe, _), gone = with_fingerprints(recipes, run, {})
    assert gone == {"one"} and isinstance(recipe, FamilyRecipe)
    assert recipe_hash(recipe.students[0]) == job.networks["one"]
    assert check_inits((recipe, None), gone) == []


PRETRAINING = """\
name: mine
model: {arch: vit, width: 16, depth: 1, heads: 2, patch: 8, ffn_width: 32, init: START}
heads:
  dino: {hidden: 8, bottleneck: 4, prototypes: 8}
  ibot: {hidden: 8, bottleneck: 4, prototypes: 8}
data: {sources: [{path: images}]}
crops: {global: {size: 32}, local: {count: 2, size: 16}}
schedule: {batch: 4, lr: {peak: 1.0e-3}}
stages: [{name: base, steps: 3}]
engine: {device: cpu, processes: 1, precision: fp32}
"""


def test_prepare__images_are_normalised_as_those_of_the_source(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family.write_text(PRETRAINING)
    run = family.parent / "run"
    job, lines = prepared(family)
    assert (job.recipe.data.mean, job.recipe.data.std) == (FACTS.mean, FACTS.std)
    (line,) = (line for line in lines if "starts from" in line)
    assert "; images have its mean [0.5, 0.5, 0.5] and std [0.2, 0.2, 0.2]" in line
    stored = read_recipes(run)[0]
    assert stored.data.mean == FACTS.mean
    given, lines = prepared(family, "data.mean=[0.4, 0.4, 0.4]", fresh=True)
    assert (given.recipe.data.mean, given.recipe.data.std) == ((0.4, 0.4, 0.4), FACTS.std)
    assert any("; its images had mean [0.5, 0.5, 0.5]" in line for line in lines)
    prepared(family, fresh=True)
    recipes = load_from_here(str(family), ())
    shutil.rmtree(family.parent / "START")
    monkeypatch.setattr("distill.job.initial.checkpoints", lambda _: ["one"])
    (recipe, _), _ = with_fingerprints(recipes, run, {})  # a resume goes on as it began
    assert recipe.data.mean == FACTS.mean and recipe_hash(recipe) == recipe_hash(job.recipe)


def test_prepare__a_student_whose_source_had_other_images_is_named(family: Path) -> None:
    family.write_text(FAMILY.replace("std: [0.2, 0.2, 0.2]", "std: [0.3, 0.3, 0.3]"))
    (family.parent / "TEACHER" / "preprocessor_config.json").unlink()
    job, lines = prepared(family)
    assert job.recipe.data.std == (0.3, 0.3, 0.3)
    assert any("; its images had" in line and "here [0.5, 0.5, 0.5]" in line for line in lines)


def test_ranks__compare_what_each_starts_from(family: Path) -> None:
    job, _ = prepared(family)
    before = facts_of(job)["init"]
    weights = random_weights(VIT)
    weights["norm.bias"] += 1.0
    write_backbone(family.parent / "START", weights, VIT, FACTS)
    assert facts_of(job)["init"] != before
    shutil.rmtree(family.parent / "START")
    assert facts_of(job)["init"] != before  # a resume needs none


@pytest.mark.slow
def test_train__starts_resumes_and_exports(family: Path) -> None:
    """One step at a rate of zero leaves the source; a resume goes on without its files."""
    zero = "schedule.lr={peak: 1.0e-30, warmup: 0}"
    ended = run_distill("train", str(family), zero, "--out", "runs", "schedule.steps=1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    one = family.parent / "runs/mine/students/one"
    source, trained = (
        load_file(folder / "model.safetensors") for folder in (family.parent / "START", one)
    )
    for name, tensor in source.items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-7)
    card = (one / "README.md").read_text()
    assert "started from: START (sha256" in card and "dinov3-license" in card
    assert (one / "LICENSE.md").read_text() == DINO
    assert "dinov3" not in (one.parent / "two" / "README.md").read_text()
