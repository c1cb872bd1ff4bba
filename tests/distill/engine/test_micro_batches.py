"""A student that runs out of memory goes on in smaller micro-batches, with the same gradient; the smallest is parked."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine.engine import prepare_deepspeed
from distill.engine.micro_batches import agreed_micro_batches, smaller_part, write_micro_batch
from distill.plan.placement import NetworkCost
from distill.plan.plan import make_plan
from distill.runfolder.events import read_events
from distill.runfolder.heartbeat import Heartbeat
from distill.runfolder.parked import read_parked
from distill.train.faults import FaultHandler
from distill.train.groups import make_groups
from distill.train.loop import run_phase
from distill.train.student import StudentTrainer
from teacher.shapes import KOLEO_GROUP
from tests.distill.train.test_ranks import Recorder
from tests.support.families import IMAGES, NoSaver, Ways, family_phase
from tests.support.jobs import run_distill, status_of, write_images
from tests.support.spawn import on_ranks
from tests.support.weights import folder_of

STEPS, ROOMY = 3, 10 * IMAGES


def test_smaller_part__is_made_of_full_groups_while_there_are_some() -> None:
    assert [smaller_part(images, 1) for images in (200, 96, 48, 33, 17)] == [96, 48, 16, 16, 16]
    assert [smaller_part(images, 1) for images in (16, 5, 2)] == [8, 2, 1]
    assert smaller_part(1, 1) is None and smaller_part(16, 16) is None
    assert smaller_part(17, 16) == 16


def limit_memory_(trainer: StudentTrainer, most_images: int) -> None:
    """From now on its forward passes take no more images than that."""
    forward = trainer.engine.forward

    def limited(batch: Any, *rest: Any) -> Any:
        if len(batch.masks) > most_images:
            raise torch.OutOfMemoryError("out of memory, tried to allocate 2 GiB")
        return forward(batch, *rest)

    trainer.engine.forward = limited  # type: ignore[method-assign]


def train(folder: str, most_images: int) -> dict[str, Any]:
    """One start of a job of a student on all ranks: its losses, or how it ended."""
    prepare_deepspeed("cpu")
    run_folder, num_ranks = Path(folder), dist.get_world_size()
    plan = make_plan([NetworkCost("a", 1.0, num_ranks)], 1.0, IMAGES, num_ranks)
    groups = make_groups(plan, timedelta(seconds=60))
    limits = agreed_micro_batches(run_folder, ["other", "a"], groups.control)
    phase = family_phase(plan, groups, STEPS, Ways(micro_batch=limits.get("a")))
    (trainer,) = phase.trainers
    assert isinstance(trainer, StudentTrainer)
    limit_memory_(trainer, most_images)
    fault_handler, recorder = FaultHandler(phase, run_folder), Recorder(phase)
    fault_handler.start(0, groups.control)
    run_phase(phase, recorder, NoSaver(), fault_handler, Heartbeat(run_folder, 0), 0)
    fault_handler.before_save(STEPS)
    return {"losses": recorder.losses, "limits": limits, "state": trainer.ema()}


@pytest.mark.slow
def test_student__out_of_memory_goes_on_with_half_the_images_and_the_same_gradient(
    tmp_path: Path,
) -> None:
    (whole,) = on_ranks(1, train, str(tmp_path), ROOMY)
    assert not whole["limits"]
    with pytest.raises(AssertionError, match="StudentError: a: out of memory in micro-batches of"):
        on_ranks(1, train, str(tmp_path), KOLEO_GROUP)
    (event,) = read_events(tmp_path)
    assert event.kind == "out of memory" and event.network == "a" and event.step == 0
    assert event.text.endswith("of 32 images, 16 from the next start on")
    (halved,) = on_ranks(1, train, str(tmp_path), KOLEO_GROUP)
    assert halved["limits"] == {"a": KOLEO_GROUP} and read_parked(tmp_path, "a") is None
    assert halved["losses"]["a"] == pytest.approx(whole["losses"]["a"], rel=2e-6)
    states: list[dict[str, Tensor]] = [halved["state"], whole["state"]]
    for key, tensor in states[1].items():
        torch.testing.assert_close(states[0][key], tensor, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_student__micro_batches_that_cut_koleo_groups_have_the_same_gradient(
    num_ranks: int, tmp_path: Path
) -> None:
    (whole,) = on_ranks(1, train, str(tmp_path), ROOMY)
    write_micro_batch(tmp_path, "a", 5)
    for cut in on_ranks(num_ranks, train, str(tmp_path), 5):
        assert cut["limits"] == {"a": 5}
        for key, tensor in cut["state"].items():
            torch.testing.assert_close(tensor, whole["state"][key], rtol=0, atol=2e-5)
        if num_ranks == 1:
            assert cut["losses"]["a"] == pytest.approx(whole["losses"]["a"], rel=2e-6)


def test_student__is_parked_where_memory_does_not_suffice_for_one_image(tmp_path: Path) -> None:
    write_micro_batch(tmp_path, "a", 1)
    with pytest.raises(AssertionError, match="StudentError: a is parked from now on"):
        on_ranks(2, train, str(tmp_path), 0)
    parked = read_parked(tmp_path, "a")
    assert parked is not None and "OutOfMemoryError" in parked.reason


MODULE = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.stride = 12, 16
        self.conv = nn.Conv2d(3, 12, 16, 16)

    def forward(self, image):
        if len(image) > 2 * 16:  # crops of more than 16 images
            raise torch.OutOfMemoryError("out of memory, tried to allocate 2 GiB")
        patch_map = self.conv(image)
        return patch_map.mean((2, 3)), patch_map
"""
RECIPE = """\
name: tiny
teacher: {weights: TEACHER, heads: none}
students: [{name: net, arch: "roomy_here:Net"}]
data: {sources: [{path: DATA}]}
crops: {global: {size: 32}, local: {count: 2, size: 16}}
schedule: {batch: 64, steps: 3, lr: {peak: 1.0e-3}}
engine: {device: cpu, processes: 2, precision: fp32}
"""


@pytest.mark.slow
def test_job__starts_again_by_itself_and_trains_every_step(tmp_path: Path) -> None:
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    text = RECIPE.replace("TEACHER", str(folder_of(tmp_path / "teacher")))
    recipe.write_text(text.replace("DATA", str(write_images(tmp_path / "images"))))
    (tmp_path / "roomy_here.py").write_text(MODULE)
    ended = run_distill("train", str(recipe), "--out", str(out), "--allow-code", "--plain")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    kinds = {event.kind for event in read_events(out / "tiny")}
    assert kinds == {"out of memory", "failed", "restarted"}, ended.stdout
    network = status_of(out / "tiny")["networks"]["net"]
    assert network["state"] != "parked" and network["skipped"] == 0
