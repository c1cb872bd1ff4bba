"""Looking at pictures: every kind of network, checkpoints of a run, and what is refused in one line."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.photographs import photograph_paths
from distill.errors import DataError, RecipeError
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job
from distill.report import look as module
from distill.report.look import (
    LookCost,
    NamedPicture,
    _Progress,
    parse_points,
    read_pictures,
)
from tests.support.checkpoints import save_checkpoint
from tests.support.command import Run
from tests.support.jobs import write_recipes
from tests.support.outside import write_outside
from tests.support.pictures import picture
from tests.support.scored_run import TINY_CONVNEXT, TINY_VIT, export


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(picture(0, 48, 72)).save(path)
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder of a teacher and three students with two checkpoints of the family."""
    folder = tmp_path / "run"
    recipe = load_job(str(write_recipes(tmp_path / "job", stage_steps=20, steps=4, save_every=2)))[
        0
    ]
    assert isinstance(recipe, FamilyRecipe)
    export(folder / "teacher", TINY_VIT, 32)
    for step in (2, 4):
        weights = {}
        for student in recipe.students:
            spec = student.backbone_spec()
            backbone = spec.build()
            spec.init_(backbone, torch.Generator().manual_seed(step))
            weights[student.label] = dict(backbone.state_dict())
            export(folder / "students" / student.label, spec, 32)
        save_checkpoint(folder / "checkpoints", step, weights)
    (folder / "job.json").write_text("{}")
    job = SimpleNamespace(recipe=recipe, teacher_recipe=None, teacher_paths=(folder / "teacher",))
    for name in ("distill.report.viewed", "distill.evaluate.files"):
        monkeypatch.setattr(f"{name}.read_job", lambda _: job)
    return folder


def test_look__networks_of_every_kind_side_by_side(
    tmp_path: Path, distill: Run, photo: Path, run: Path
) -> None:
    export(tmp_path / "conv", TINY_CONVNEXT, 32)
    outside, _ = write_outside(tmp_path / "dinov2", "dinov2")
    weights = tmp_path / "conv" / "model.safetensors"
    found = distill(
        "look", photo, "builtin:coffee", "--size", 64, "--json", "-o", tmp_path / "out.png",
        "--with", run, "--with", f"{run}:plain", "--with", weights, "--with", outside,
    )  # fmt: skip
    assert found.code == 0, found.err
    facts = json.loads(found.out)
    names = facts["pictures"]["photo.png"]["lowest_cosine"]
    assert list(names) == ["teacher", "conv", "gated", "plain", "model", "dinov2"]
    assert list(facts["pictures"]) == ["photo.png", "coffee"]
    assert "photo.png: 72 x 48 px, looked at as 64 x 40 px" in found.err
    assert "looked at as 70 x 42 px (64 is rounded to a multiple of the patch, 14 px)" in found.err
    assert "GiB free on cpu" in found.err and "TFLOP" in found.err
    with Image.open(tmp_path / "out.png") as out:
        assert out.format == "PNG" and out.width > 6 * 180
    assert [path.name for path in tmp_path.glob("*.part")] == []


def test_look__over_the_checkpoints_of_a_run(
    tmp_path: Path, distill: Run, photo: Path, run: Path
) -> None:
    words = ("look", photo, "--size", 64, "--json", "-o", tmp_path / "out.png", "--over-steps")
    every = json.loads(distill(*words, run).out)["pictures"]["photo.png"]["lowest_cosine"]
    assert list(every) == [
        f"{name}: step {step}" for name in ("plain", "gated", "conv") for step in (2, 4)
    ]
    one = json.loads(distill(*words, f"{run}:conv").out)["pictures"]["photo.png"]["lowest_cosine"]
    assert list(one) == ["conv: step 2", "conv: step 4"]
    assert one["conv: step 2"] != one["conv: step 4"]
    wrong = distill(*words, f"{run}:other")
    assert (wrong.code, wrong.out) == (2, "")
    assert (
        "no checkpoint with other in it\nFix: Its checkpoints hold: plain, gated, conv."
        in wrong.err
    )


def test_look__tiles_and_a_point(tmp_path: Path, distill: Run, photo: Path, run: Path) -> None:
    words = ("look", photo, "--size", 96, "--json", "-o", tmp_path / "out.png", "--with", run)
    found = distill(*words, "--tiles", "--tile-size", 48, "--at", "71,0", "--no-foreground")
    entry = json.loads(found.out)["pictures"]["photo.png"]
    assert entry["at"] == pytest.approx([71.5 / 72, 0.5 / 48]) and entry["foreground"] is None
    assert "(96 is rounded" not in found.err and "enlarged" in found.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--size", 5000), 2, "--size 5000: not a size to look at\nFix: Give 32 to 4096 px"),
        (("--tiles", "--tile-size", 8), 2, "--tile-size 8: not a size of a tile"),
        (("-o", "out.jpg"), 2, "--out out.jpg: a PNG is written\nFix: Write -o out.png."),
        (("-o", "none/out.png"), 2, "--out none/out.png: no folder none"),
        (("--at", "0.5"), 2, "--at 0.5: not a point\nFix: Give 0.5,0.5 in fractions, or pixels"),
        (("--at", "72,0"), 2, "--at 72,0: not in photo.png of 72 x 48 px"),
        (("--at", "nan,0.1"), 2, "--at nan,0.1: not in photo.png"),
        (("--at", "0,0", "--at", "1,1"), 2, "--at: 2 points for 1 pictures"),
        (("--with", "none"), 2, "none: no such file or folder"),
        (("--with", "RUN:none"), 2, "RUN:none: the run has no network none"),
        (("--over-steps", "RUN"), 2, "no network to look with, or two ways"),
    ],
)  # fmt: skip
def test_look__refuses_in_one_line(
    words: tuple[object, ...],
    code: int,
    message: str,
    distill: Run,
    photo: Path,
    run: Path,
) -> None:
    given = [str(each).replace("RUN", str(run)) for each in words]
    found = distill("look", photo, "--with", run, *given)
    assert (found.code, found.out) == (code, "")
    assert message.replace("RUN", str(run)) in found.err
    assert found.err.count("Fix: ") == 1 and "Traceback" not in found.err
    assert not Path("look.png").exists()


def test_look__without_a_network(distill: Run, photo: Path) -> None:
    found = distill("look", photo)
    assert found.code == 2 and "Give networks by --with RUN" in found.err


def test_look__more_than_the_memory_holds_is_refused_before_the_work(
    distill: Run, photo: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda _: 1000)
    monkeypatch.setattr(module, "patch_features", lambda *_, **__: pytest.fail("computed"))
    found = distill("look", photo, "--with", run, "--size", 256)
    assert found.code == 3
    assert "--size 256: takes about" in found.err
    assert "Fix: Take --size 128, or --tiles." in found.err


def test_read_pictures__upright_by_exif(tmp_path: Path) -> None:
    pixels = picture(0, 40, 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    found = read_pictures([str(tmp_path / "turned.png")], None)[0]
    assert np.array_equal(found.pixels, np.rot90(pixels, -1))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none.jpg", "no such file"), ("text.jpg", "not an image"), ("folder", "a folder")],
)
def test_read_pictures__names_what_cannot_be_used(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "text.jpg").write_text("text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=f"{name}: cannot be used as a picture \\({reason}\\)"):
        read_pictures([str(tmp_path / name)], None)


def test_read_pictures__bundled_ones_by_name() -> None:
    assert read_pictures(["builtin:coffee"], None)[0].name == "coffee"
    assert "coffee" in photograph_paths()
    with pytest.raises(DataError, match="builtin:tea: no such photograph"):
        read_pictures(["builtin:tea"], None)


def test_parse_points__fractions_pixels_and_one_for_all() -> None:
    pictures = [NamedPicture("a", picture(0, 10, 20)), NamedPicture("b", picture(0, 10, 40))]
    assert parse_points([], pictures) == [None, None]
    assert parse_points(["0.25,1.0"], pictures) == [(1.0, 0.25)] * 2
    assert parse_points(["19,0", "39,9"], pictures) == [
        (pytest.approx(0.05), pytest.approx(0.975)),
        (pytest.approx(0.95), pytest.approx(0.9875)),
    ]
    with pytest.raises(RecipeError, match="--at 1,10: not in a of 20 x 10 px"):
        parse_points(["1,10"], pictures)


def test_progress__counts_by_estimated_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [100.0], list[str]()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = _Progress(LookCost({(0, 0): 10.0, (1, 0): 30.0}), lines.append)
    progress.begin((0, 0), "first on a")
    now[0] += 1.0
    progress.report(0.5)
    assert lines == [], "too soon for a line"
    now[0] += 9.0
    progress.report(0.5)
    progress.begin((1, 0), "second on a")
    now[0] += 10.0
    progress.report(1 / 3)
    assert lines == [
        "first on a: 12% of all, 1 min 10 s left",
        "second on a: 50% of all, 20 s left",
    ]
