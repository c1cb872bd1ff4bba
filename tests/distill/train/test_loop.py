"""The loop on stand-ins: whoever fails, and wherever, the rank names the step of the phase that it trains."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from distill.bench.stand_ins import SleepingStudent
from distill.plan.placement import NetworkCost
from distill.plan.plan import Plan, PlanOptions, make_plan
from distill.runfolder.failure import failure_of
from distill.runfolder.heartbeat import Heartbeat
from distill.train.by_step import PlanSchedule
from distill.train.exchange import Outgoing
from distill.train.faults import FaultHandler
from distill.train.loop import run_phase
from distill.train.masking import DrawnMasks
from distill.train.phase import Decision, Phase
from distill.train.schedule import StepNumbers
from distill.train.student import Attempt, Stopwatch
from teacher.batch import CropBatch, Delivery, PatchMasks, StudentBatch, TeacherTargets
from teacher.losses import Objective
from teacher.task import StepScalars

CPU = torch.device("cpu")
IMAGES = 2
FIRST_STEP = 90  # of a second stage
STEPS, FAILING, LOOKAHEAD = 5, 2, 1
PARTS = {"loader": LOOKAHEAD, "masks": LOOKAHEAD, "teacher": LOOKAHEAD, "exchange": 0}
PARTS |= {"trainer": 0, "after_step": 0, "recorder": 0}


class Parts:
    """Stands in for everything that the loop drives; one of them fails at the step of the phase."""

    def __init__(self, plan: Plan, failing: str) -> None:
        self._plan, self._failing = plan, failing
        self.wants_all_patches, self._run_step = False, 0
        self.wait_s, self.received_bytes = 0.0, 0

    def at_step(self, part: str, run_step: int) -> None:
        if part == self._failing and run_step == FIRST_STEP + FAILING + PARTS[part]:
            raise ValueError("spoiled")

    def fetch(self, run_step: int) -> CropBatch:
        self.at_step("loader", run_step)
        self._run_step = run_step
        pixels = torch.zeros(IMAGES, 2, 3, 4, 4, dtype=torch.uint8)
        return CropBatch(pixels, pixels)

    def draw(self, run_step: int) -> DrawnMasks:
        self.at_step("masks", run_step)
        masks = PatchMasks.of(torch.ones(IMAGES, 2, 4, dtype=torch.bool))
        return DrawnMasks(masks, masks, np.full((IMAGES, 2), 4))

    def teach(self, crops: CropBatch, masks: PatchMasks) -> TeacherTargets:
        self.at_step("teacher", self._run_step)
        return TeacherTargets(torch.zeros(IMAGES, 2, 1), torch.zeros(sum(masks.counts), 1))

    def start(self, outgoing: Outgoing) -> Any:
        return outgoing

    def wait(self, outgoing: Outgoing) -> Delivery:
        self.at_step("exchange", outgoing.step)
        needs = self._plan.required_positions[0]
        return Delivery(outgoing.crops, outgoing.targets, outgoing.masks_of_required, needs)

    def at(self, run_step: int) -> StepNumbers:
        scalars = StepScalars(Objective(1.0, 1.0, 0.0, 1.0), 1.0, 1.0)
        return StepNumbers(run_step, (2, 2), 0.07, scalars, {})

    def is_finite_here(self) -> torch.Tensor:
        return torch.ones((), dtype=torch.bool)

    def anchor_state(self) -> dict[str, torch.Tensor]:
        return {}

    def make_room(self, max_images: int) -> None:
        pass

    def close(self) -> None:
        pass

    def save(self, phase: Phase, step: int, held: object) -> None:
        raise AssertionError(f"{phase.name}: nothing asked for a save at step {step}")

    def after_step(self, phase_step: int) -> None:
        self.at_step("after_step", FIRST_STEP + phase_step - 1)

    def record(self, _: Phase, phase_step: int, __: object) -> Decision:
        self.at_step("recorder", FIRST_STEP + phase_step - 1)
        return Decision(save=False, stop=False)

    def report(self) -> None:
        pass


class Trainer(SleepingStudent):
    """Without ranks to meet."""

    def __init__(self, parts: Parts, plan: Plan) -> None:
        super().__init__(plan.placements[0], dist.ProcessGroup(0, 1), 0.0, 0)
        self._parts = parts

    def train_step(self, batch: StudentBatch, numbers: StepNumbers) -> Attempt:
        assert len(batch.masks) == IMAGES
        self._parts.at_step("trainer", numbers.run_step)
        return Attempt(torch.ones((), dtype=torch.bool), {})


def second_stage(parts: Any, plan: Plan) -> Phase:
    return Phase(
        name="gram",
        num_steps=STEPS,
        first_step=FIRST_STEP,
        lookahead=LOOKAHEAD,
        plan=plan,
        plan_schedule=PlanSchedule(plan),
        world_rank=0,
        schedule=parts,
        loader=parts,
        masks=parts,
        teacher=parts,
        teaching=Stopwatch(CPU),
        exchange=parts,
        trainers=(Trainer(parts, plan),),
        after_step=parts.after_step,
    )


@pytest.mark.parametrize("failing", PARTS)
def test_run_phase__a_rank_that_fails_in_a_second_stage_names_the_step_it_trains(
    failing: str, tmp_path: Path
) -> None:
    plan = make_plan([NetworkCost("a", 1.0)], 1.0, IMAGES, 1, PlanOptions(lookahead=LOOKAHEAD))
    parts: Any = Parts(plan, failing)
    phase, heartbeat = second_stage(parts, plan), Heartbeat(tmp_path, 0)
    heartbeat.enter_phase("base", 0)
    heartbeat.enter_phase("gram", 0)
    with pytest.raises(ValueError, match="spoiled") as error:
        run_phase(phase, parts, parts, FaultHandler(phase, tmp_path), heartbeat, 0)
    record = heartbeat.record()
    assert record.progress == (2, FAILING)
    failure = failure_of(error.value, record, tmp_path)
    assert f", gram step {FAILING}; ValueError: spoiled" in failure.message


def test_run_phase__trains_every_step_once(tmp_path: Path) -> None:
    plan = make_plan([NetworkCost("a", 1.0)], 1.0, IMAGES, 1, PlanOptions(lookahead=LOOKAHEAD))
    parts: Any = Parts(plan, "")
    phase, heartbeat = second_stage(parts, plan), Heartbeat(tmp_path, 0)
    fault_handler = FaultHandler(phase, tmp_path)
    assert run_phase(phase, parts, parts, fault_handler, heartbeat, 1)
    assert phase.teaching.units == (STEPS - 1) * IMAGES
    assert heartbeat.record().phase_step == STEPS - 1
