"""A refused resume names what changed: keys with both values, images with their number."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from distill.job.prepare import CHECKPOINTS, Job, JobRequest, prepare
from distill.plan.flops import DEFAULT_DEVICE
from distill.plan.here import RATE
from distill.runfolder import manifest as checkpoint
from distill.runfolder.manifest import FORMAT_VERSION, ChangedError, Manifest, NetworkFacts
from tests.support.jobs import FAMILY, TEACHER, write_images

Change = Callable[[Path], object]


def start(folder: Path, *overrides: str) -> Job:
    request = JobRequest(str(folder / "family.yaml"), overrides, str(folder / "run"), "")
    return prepare(request, num_ranks=1, fresh=False, say=lambda _: None)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Recipes, images, and a run folder with a checkpoint of the family."""
    images = str(write_images(tmp_path / "images"))
    (tmp_path / "teacher.yaml").write_text(TEACHER.replace("DATA", images))
    (tmp_path / "family.yaml").write_text(FAMILY.replace("DATA", images).replace("STEPS", "20"))
    job = start(tmp_path)
    folder = tmp_path / "run" / CHECKPOINTS / "family-0000005"
    folder.mkdir(parents=True)
    networks = {name: NetworkFacts(hash=h, first_step=0) for name, h in job.networks.items()}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        number=1,
        phase="family",
        step=5,
        num_ranks=1,
        is_milestone=False,
        recipe_hash=job.hash,
        networks=networks,
        files={},
    )
    (folder / checkpoint.MANIFEST).write_text(manifest.to_text())
    return tmp_path


def first(folder: Path) -> Path:
    return min((folder / "images").rglob("*.png"))


def enlarge(folder: Path) -> None:
    Image.new("RGB", (200, 90)).save(first(folder))


def move(folder: Path) -> None:
    """To another class: the same name within the source has no other meaning, so it is another image."""
    image, last = first(folder), max((folder / "images").rglob("*.png"))
    image.rename(last.parent / f"moved-{image.name}")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("schedule.lr.peak=0.5",), ["schedule.lr.peak: 0.5, was 0.001"]),
        (
            ("seed=7", "crops.flip=0.25"),
            ["seed: 7, was 0", "crops.flip: 0.25, was 0.5"],
        ),
        (("teacher:schedule.clip=9.0",), ["teacher:schedule.clip: 9.0, was 3.0"]),
        (("teacher.heads=none",), ["teacher.heads: none, was file"]),
        (("students.0.lr=0.3",), ["lr: 0.3, was null"]),
    ],
)
def test_prepare__names_the_keys_that_differ(
    overrides: tuple[str, ...], expected: list[str], saved: Path
) -> None:
    with pytest.raises(ChangedError) as caught:
        start(saved, *overrides)
    lines = caught.value.message.splitlines()[1:]
    assert len(lines) == len(expected), lines
    assert all(any(line.endswith(text) for line in lines) for text in expected), lines


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: first(folder).unlink(), ["images: 1 removed ("]),
        (
            lambda folder: shutil.copy(first(folder), first(folder).with_name("new.png")),
            ["images: 1 added ("],
        ),
        (enlarge, ["images: 1 of another size ("]),
        (move, ["images: 1 added (", "images: 1 removed ("]),
    ],
)
def test_prepare__says_how_the_images_changed(
    change: Change, expected: list[str], saved: Path
) -> None:
    change(saved)
    with pytest.raises(ChangedError) as caught:
        start(saved)
    lines = caught.value.message.splitlines()
    assert "or of its images" in lines[0] and len(lines) == 1 + len(expected), lines
    assert all(any(text in line for line in lines) for text in expected), lines


def test_prepare__goes_on_where_nothing_changed(saved: Path) -> None:
    start(saved, "checkpoint.every=7")
    plan = json.loads((saved / "run" / "plan.json").read_text())
    assert plan["device"] == "this CPU" and plan[RATE] < DEFAULT_DEVICE.tflops_per_s / 10
