"""Licences and origin from the recipe to the folders of a run: prepared, trained, scored, exported, taught again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distill.errors import RecipeError
from distill.export.card import KEEP_MARK
from distill.export.licences import licences_in
from distill.export.network_names import base_model, teacher_name
from distill.export.save import ExportFacts, write_backbone
from distill.job.origin import (
    LICENCES,
    background_of,
    complete_cards,
    licence_warning,
    licences_of_teacher,
    stored_licences,
    student_record,
)
from distill.job.prepare import JobRequest, prepare
from distill.job.stored_recipes import load_from_here
from distill.recipe.recipe_hash import recipe_hash
from tests.support.command import Run
from tests.support.exports import INPUTS, VIT, write_network
from tests.support.jobs import write_images

DINO = "# DINOv3 License\n\nThe terms.\n"
RECIPE = """\
name: mine
teacher: {weights: TEACHER, heads: none}
students: [{name: one, arch: vit, width: 16, depth: 1, heads: 2, patch: 8}]
data: {sources: [{path: images}]}
crops: {global: {size: 32}, local: {count: 2, size: 16}}
schedule: {batch: 4, steps: 3, lr: {peak: 1.0e-3, warmup: 0}}
engine: {device: cpu, processes: 1, precision: fp32}
"""


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose teacher is a folder of somebody else, without a licence."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    given(tmp_path / "TEACHER")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path / "mine.yaml"


def given(folder: Path) -> Path:
    write_network(folder, VIT)
    for name in ("README.md", "distill.json"):
        (folder / name).unlink()
    return folder


def test_check__unknown_and_contradicting_are_one_warning(family: Path, distill: Run) -> None:
    ended = distill("check", family)
    assert ended.code == 0
    (line,) = (line for line in ended.out.splitlines() if "licence" in line)
    assert line.startswith(
        "warning: licence of the teacher unknown, and so in every card: TEACHER: "
    )
    assert "its folder states no licence; state it in teacher.licence" in line
    folder = family.parent / "TEACHER"
    (folder / "LICENSE").write_text(DINO)
    assert "licence" not in distill("check", family).out
    assert json.loads(distill("check", family, "--json").out)["licence_warning"] is None
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (line,) = (line for line in distill("check", family).out.splitlines() if "licence" in line)
    assert "contradicting statements (README.md: apache-2.0; LICENSE: dinov3-license)" in line
    third = distill("check", family, "teacher.licence.name=MIT", "--json")
    assert "teacher.licence: mit; README.md" in json.loads(third.out)["licence_warning"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.licence={}", "names nothing: give a 'name', a 'file' or a 'link'"),
        ("teacher.licence.file=absent.txt", "'absent.txt' is not there"),
        ("teacher.license=mit", "did you mean 'licence'"),
    ],
)
def test_check__a_wrong_key_is_one_line(
    override: str, message: str, family: Path, distill: Run
) -> None:
    ended = distill("check", family, override)
    assert ended.code == 2 and message in ended.out + ended.err


def test_key__changes_no_hash_and_is_stored_with_its_path(family: Path, tmp_path: Path) -> None:
    (tmp_path / "terms.txt").write_text(DINO)
    with_key = ("teacher.licence={name: DINOv3 License, file: terms.txt}",)
    plain, keyed = (load_from_here(str(family), words)[0] for words in ((), with_key))
    assert recipe_hash(plain) == recipe_hash(keyed)
    request = JobRequest(str(family), with_key, str(tmp_path / "run"), "")
    job = prepare(request, num_ranks=1, fresh=False, say=lambda _: None)
    assert str(tmp_path / "terms.txt") in (tmp_path / "run/recipe.resolved.yaml").read_text()
    noted = licences_in(tmp_path / "run" / LICENCES)
    assert noted.texts == {"LICENSE-terms.txt": DINO.encode()}
    assert noted == stored_licences(tmp_path / "run", job.recipe, None)
    shutil.rmtree(tmp_path / "TEACHER")
    assert stored_licences(tmp_path / "run", job.recipe, None) == noted
    short = load_from_here(str(family), ("teacher.licence=mit",))[0]
    assert licences_of_teacher(short, None).terms[0].identifiers == ("mit",)
    with pytest.raises(RecipeError, match=r"teacher\.licence"):
        load_from_here(str(family), ("teacher.licence=3",))


@pytest.mark.slow
def test_chain__from_a_teacher_over_students_to_exports(
    family: Path, distill: Run, tmp_path: Path
) -> None:
    teacher = tmp_path / "TEACHER"
    (teacher / "LICENSE").write_text(DINO)
    (teacher / "NOTICE").write_text("thanks")
    assert distill("train", family, "--out", tmp_path / "runs", "--plain").code == 0
    run = tmp_path / "runs" / "mine"
    made = run / "students" / "one"
    card = (made / "README.md").read_text()
    assert "Distilled from a frozen teacher" in card and "license_name: dinov3-license" in card
    assert "| this network |" in card, "scores are added when there are some"
    assert "- data: 24 images from images" in card and "teacher: TEACHER (vit, " in card
    assert json.loads((run / "summary.json").read_text())["licences"][0]["network"] == "TEACHER"
    shutil.rmtree(teacher)
    for form in ("hf", "meta"):
        ended = distill("export", run, "--to", form)
        assert ended.code == 0, ended.err
        folder = run / "export" / form / "one"
        assert (folder / "LICENSE").read_text() == DINO
        assert (folder / "NOTICE").read_text() == "thanks"
    next_one = ("name=next", f"teacher.weights={run / 'export/hf/one'}")
    (run / "export/hf/one/LICENSE-mine").write_text("ACME Licence\n")
    assert distill("train", family, *next_one, "--out", tmp_path / "runs", "--plain").code == 0
    last = tmp_path / "runs/next/students/one"
    assert (last / "LICENSE").read_text() == DINO
    assert (last / "LICENSE-mine").read_text() == "ACME Licence\n"
    card = (last / "README.md").read_text()
    assert "itself distilled from TEACHER" in card and "- TEACHER: DINOv3 License" in card
    assert "one of mine: ACME Licence" in card


def test_cards__are_completed_unless_the_user_took_one_over(family: Path, tmp_path: Path) -> None:
    request = JobRequest(str(family), (), str(tmp_path / "run"), "")
    job = prepare(request, num_ranks=1, fresh=False, say=lambda _: None)
    folder = write_student(job, tmp_path / "run/students/one")
    assert "No k-NN scores: the run was not scored." in (folder / "README.md").read_text()
    scores = {"students": {"one": {"knn": 0.5}}}
    assert complete_cards(job, {"one": VIT}, scores) == []
    text = (folder / "README.md").read_text()
    assert "| this network | 0.500 |" in text and "TEACHER: unknown" in text
    (folder / "README.md").write_text(text.replace(KEEP_MARK, "") + "mine")
    complete_cards(job, {"one": VIT}, {})
    assert (folder / "README.md").read_text().endswith("mine")


def test_background__a_licence_that_was_found_out_later_goes_along(
    family: Path, tmp_path: Path
) -> None:
    request = JobRequest(str(family), (), str(tmp_path / "run"), "")
    job = prepare(request, num_ranks=1, fresh=False, say=lambda _: None)
    folder = write_student(job, tmp_path / "run/students/one")
    recipes = (job.recipe, None)
    assert background_of(tmp_path / "run", "one", folder, recipes, {}).licences.problems
    (tmp_path / "TEACHER/LICENSE").write_text(DINO)
    now = background_of(tmp_path / "run", "one", folder, recipes, {}).licences
    assert now.terms[0].identifiers == ("dinov3-license",) and "LICENSE" in now.texts


def write_student(job: Any, folder: Path) -> Path:
    record = student_record(job, VIT, "12ab", 24, 3)
    licences = licences_in(job.run_folder / LICENCES)
    weights = VIT.build().state_dict()
    facts = ExportFacts(INPUTS.size, INPUTS.mean, INPUTS.std, record, licences)
    write_backbone(folder, weights, VIT, facts)
    return folder


def test_warning__a_teacher_that_the_run_trains_has_none() -> None:
    recipe, teacher = load_from_here("quickstart", ())
    assert licence_warning(recipe, teacher) is None
    (terms,) = licences_of_teacher(recipe, teacher).terms
    assert terms.is_pretrained and terms.network == "quickstart-teacher"


def test_base_model__only_where_something_proves_it(tmp_path: Path) -> None:
    hub = "models--facebook--dinov3-vitb16-pretrain-lvd1689m"
    cached = given(tmp_path / "hub" / hub / "snapshots" / "ab12")
    assert base_model(cached) == "facebook/dinov3-vitb16-pretrain-lvd1689m" == teacher_name(cached)
    released = tmp_path / "dinov3_vits16_pretrain_lvd1689m-08c60483.pth"
    assert base_model(released, "08c60483" + 56 * "0") == "facebook/dinov3-vits16-pretrain-lvd1689m"
    assert base_model(released, 64 * "0") == "" and teacher_name(released) == released.name
    plain = given(tmp_path / "big")
    assert base_model(plain) == "" and teacher_name(plain) == "big"
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "_name_or_path": "owner/net"}))
    assert base_model(plain) == "owner/net"
    (plain / "config.json").write_text(json.dumps({**config, "_name_or_path": "/data/net"}))
    assert base_model(plain) == ""
