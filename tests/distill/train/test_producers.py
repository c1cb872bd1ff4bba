"""Features that are not finite are their producer's fault: no student skips a step or is parked for them."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from distill.engine.engine import prepare_deepspeed
from distill.plan.placement import NetworkCost
from distill.plan.plan import PlanOptions, make_plan
from distill.runfolder.events import read_events
from distill.runfolder.heartbeat import Heartbeat, record_path
from distill.train.faults import FaultHandler
from distill.train.groups import make_groups
from distill.train.loop import run_phase
from distill.train.phase import Decision, Phase
from teacher.batch import CropBatch, PatchMasks, TeacherTargets
from tests.support.families import IMAGES, WHOLE, NoSaver, Ways, family_phase
from tests.support.jobs import run_distill, status_of, write_images
from tests.support.spawn import on_ranks
from tests.support.weights import folder_of

NUM_STEPS, LOG_EVERY = 7, 2
APART = [NetworkCost("a", 2.0, 1), NetworkCost("b", 1.0, 1)]
TOGETHER = [NetworkCost("a", 2.0, 2), NetworkCost("b", 1.0, 2)]  # all on both ranks


class Recorder:
    """Reads numbers at every other step, like the real one."""

    def __init__(self, phase: Phase) -> None:
        self.losses: dict[str, list[float]] = {trainer.name: [] for trainer in phase.trainers}
        self.skipped = 0

    def record(self, phase: Phase, step: int, faults: Any) -> Decision:
        if step % LOG_EVERY == 0 or step == phase.num_steps:
            faults()
            for trainer in phase.trainers:
                values = trainer.read_metrics(wait=0.0)
                assert values is not None
                self.losses[trainer.name].append(values["loss"])
                self.skipped += int(values["skipped"])
        return Decision(save=False, stop=False)


def spoil_teacher_(phase: Phase, calls: range, what: str) -> None:
    """From now on some calls of this rank's teacher give a row that is not finite."""
    teach, num_calls = phase.teacher.teach, 0

    def spoiled(crops: CropBatch, masks: PatchMasks) -> TeacherTargets:
        nonlocal num_calls
        num_calls += 1
        targets = teach(crops, masks)
        if num_calls - 1 in calls:
            rows = getattr(targets, what).clone()
            rows[-1:] = float("inf")
            targets = replace(targets, **{what: rows})
        return targets

    phase.teacher.teach = spoiled  # type: ignore[method-assign]


def train(
    works: list[NetworkCost],
    ways: Ways,
    bad: dict[int, range],
    folder: str,
    what: str = "class_features",
    *,
    is_frozen: bool = True,
) -> dict[str, Any]:
    """The real loop over two students; ``bad``: calls of a rank's teacher that give what is not finite."""
    prepare_deepspeed("cpu")
    rank, run_folder = dist.get_rank(), Path(folder)
    options = PlanOptions(lookahead=ways.lookahead)
    plan = make_plan(works, 1.0, IMAGES, dist.get_world_size(), options)
    groups = make_groups(plan, timedelta(seconds=60))
    phase = replace(family_phase(plan, groups, NUM_STEPS, ways), has_frozen_teacher=is_frozen)
    if rank in bad:
        spoil_teacher_(phase, bad[rank], what)
    fault_handler, recorder = FaultHandler(phase, run_folder, "/teacher/file"), Recorder(phase)
    fault_handler.start(0, groups.control)
    with Heartbeat(run_folder, rank) as heartbeat:
        while not record_path(run_folder, rank).is_file():
            pass
        dist.barrier()
        run_phase(phase, recorder, NoSaver(), fault_handler, heartbeat, 0)
        fault_handler.before_save(NUM_STEPS)
        dist.barrier()
    return {
        "losses": recorder.losses,
        "states": {trainer.name: trainer.state() for trainer in phase.trainers},
        "counts": fault_handler.counts(),
        "skipped": recorder.skipped,
        "texts": sorted({event.text for event in read_events(run_folder)}),
    }


def assert_same(results: list[dict[str, Any]], calm: list[dict[str, Any]]) -> None:
    for one, other in zip(results, calm, strict=True):
        assert one["losses"] == other["losses"]
        for name, state in other["states"].items():
            assert all(torch.equal(one["states"][name][key], state[key]) for key in state), name


@pytest.mark.parametrize(
    ("works", "lookahead", "call", "what"),
    [
        (APART, 2, 1, "class_features"),
        pytest.param(APART, 0, 1, "patch_features", marks=pytest.mark.slow),
        pytest.param(APART, 2, NUM_STEPS - 1, "patch_features", marks=pytest.mark.slow),  # the last
        pytest.param(TOGETHER, 0, 2, "class_features", marks=pytest.mark.slow),
    ],
)
def test_features__that_are_bad_once_cost_no_student_a_step(
    works: list[NetworkCost], lookahead: int, call: int, what: str, tmp_path: Path
) -> None:
    ways = Ways(lookahead=lookahead)
    calm = on_ranks(2, train, works, ways, {}, str(tmp_path / "calm"))
    bad = {1: range(call, call + 1)}
    results = on_ranks(2, train, works, ways, bad, str(tmp_path / "bad"), what)
    assert_same(results, calm)
    for result in results:
        assert result["skipped"] == 0 and not any(result["counts"])
        (text,) = result["texts"]
        assert text.startswith("rank 1 on ") and f"features of family step {call} were" in text
    assert not (tmp_path / "bad" / "parked").exists()


@pytest.mark.parametrize(
    ("works", "lookahead", "bad", "message"),
    [
        (
            APART,
            2,
            {1: range(1, 1000)},
            "RankError: rank 1 on .*, (computed twice|for the second time), ",
        ),
        pytest.param(
            TOGETHER,
            0,
            {1: range(1, 1000)},
            "RankError: rank 1 on .*, computed twice, ",
            marks=pytest.mark.slow,
        ),
        pytest.param(  # the receivers compute as well, so that the calls of steps 1 and 3 are these
            TOGETHER,
            0,
            {1: range(1, 7, 4)},
            "RankError: rank 1 on .*, for the second time, ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            TOGETHER,
            0,
            dict.fromkeys((0, 1), range(1, 1000)),
            "UserError: /teacher/file: .* on any rank, family step 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_features__that_stay_bad_end_the_job_and_park_nobody(
    works: list[NetworkCost], lookahead: int, bad: dict[int, range], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=message):
        on_ranks(2, train, works, Ways(lookahead=lookahead), bad, str(tmp_path))
    assert not (tmp_path / "parked").exists()
    kinds = {event.kind for event in read_events(tmp_path)}
    assert kinds <= {"recomputed"}


def train_by_ema(bad: range, folder: str) -> dict[str, Any]:
    """As if the teacher changed from step to step, as it does in pretraining."""
    return train(TOGETHER, WHOLE, {1: bad}, folder, is_frozen=False)


@pytest.mark.slow
def test_features__of_an_ema_that_are_bad_once_cost_a_step_and_twice_end_the_job(
    tmp_path: Path,
) -> None:
    for result in on_ranks(2, train_by_ema, range(1, 2), str(tmp_path / "once")):
        assert result["skipped"] == 2 and result["counts"] == [1.0, 0.0, 0.0] * 2
        skipped = "step 1 skipped, the targets of rank 1 are not finite"
        assert result["texts"] == [f"{name}: {skipped}" for name in "ab"]
    with pytest.raises(AssertionError, match=r"RankError: rank 1 on .*, for the second time, "):
        on_ranks(2, train_by_ema, range(1, 3), str(tmp_path / "twice"))
    assert not (tmp_path / "twice" / "parked").exists()


RECIPE = """\
name: tiny
teacher: {weights: TEACHER, heads: none}
students:
  - {name: one, arch: vit, width: 16, depth: 1, heads: 2, patch: 8}
  - {name: two, arch: vit, width: 16, depth: 1, heads: 2, patch: 8}
data: {sources: [{path: DATA}]}
crops: {global: {size: 32}, local: {count: 2, size: 16}}
schedule: {batch: 8, steps: 4, lr: {peak: 1.0e-3}}
engine: {device: cpu, processes: 2, precision: fp32}
"""


@pytest.mark.slow
def test_job__names_weights_whose_features_are_not_finite_and_goes_on_with_others(
    tmp_path: Path,
) -> None:
    teacher, recipe, out = folder_of(tmp_path / "teacher"), tmp_path / "tiny.yaml", tmp_path / "out"
    text = RECIPE.replace("TEACHER", str(teacher))
    recipe.write_text(text.replace("DATA", str(write_images(tmp_path / "images"))))
    (path,) = teacher.glob("*.safetensors")
    good = path.read_bytes()
    weights = load_file(path)
    largest = max(weights, key=lambda name: weights[name].ndim)  # the patch embedding
    weights[largest] = torch.full_like(weights[largest], 3e38)  # each is finite, their sums are not
    save_file(weights, path, metadata={"format": "pt"})
    command = ["train", str(recipe), "--out", str(out), "--max-restarts", "2", "--plain"]
    ended = run_distill(*command)
    assert ended.returncode == 4, ended.stdout + ended.stderr
    assert f"{teacher}: the features of this teacher are not finite on any rank" in ended.stderr
    assert not (out / "tiny" / "parked").exists()
    path.write_bytes(good)
    ended = run_distill(*command)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    networks = status_of(out / "tiny")["networks"]
    assert {network["skipped"] for network in networks.values()} == {0}, json.dumps(networks)
