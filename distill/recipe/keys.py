"""The recipe as typed, frozen models.

Two kinds, distinguished by their keys: a *family* recipe has ``students``, a *teacher* recipe has
``stages``. The sections are in ``networks``, ``inputs`` and ``schedules``.

``distill.recipe.reader`` reads YAML into these models and reports what is wrong, where. Imports no
torch, so that the command line starts fast.
"""

import re
from typing import Annotated, Literal

from pydantic import Strict

from distill.recipe.inputs import CropsSpec, DataSpec, MasksSpec
from distill.recipe.networks import HeadsSpec, Model, Student, TeacherSource
from distill.recipe.schedules import (
    FamilyScheduleSpec,
    ObjectiveSpec,
    StageSpec,
    TeacherScheduleSpec,
)
from distill.recipe.types import Every, Name, Section, machine, science

HEADS_PHASE, FAMILY_PHASE = RESERVED_PHASES = ("heads", "family")


class EngineSpec(Section):
    """Where and how fast. ``processes`` counts local ranks; ``auto`` is one per GPU.

    ``lookahead``: steps that a frozen teacher may work ahead of its students. ``exchange``: to each
    rank its slice, or everything to everybody with even teacher shares, as published. ``balance``:
    steps between two measurements of every rank's speed, after which shares follow it; 0 for never.
    ``teacher_sharding``: the full teacher on every rank, or a part of it (ZeRO-3) with even shares;
    ``auto`` for full where it fits. ``micro_batch``: images that a trained network takes at once, full KoLeo groups of 16; by default
    all of a rank's slice. ``zero``: what is sharded over the ranks of a trained network - 1 optimizer state,
    2 gradients too, 3 weights too. ``activation_checkpointing``: each block's insides are computed again
    for the backward pass instead of kept. ``hang_limit_s``: a rank that does not move this long is named
    and the job ended; steps and saves that took longer before may again.
    """

    device: Literal["auto", "cpu", "cuda"] = machine("auto")
    processes: int | Literal["auto"] = machine("auto")
    precision: Literal["fp32", "bf16"] = science("bf16")
    zero: Literal[1, 2, 3] = machine(1)
    activation_checkpointing: bool = machine(False)
    teacher_micro_batch: int = machine(16, ge=1)
    teacher_sharding: Literal["auto", "replicated", "sharded"] = machine("auto")
    micro_batch: int | None = machine(None, ge=16, multiple_of=16)
    lookahead: int = machine(2, ge=0, le=16)
    exchange: Literal["slices", "all_gather"] = machine("slices")
    balance: int = machine(200, ge=0)
    hang_limit_s: float = machine(30.0, ge=2.0)


class CheckpointSpec(Section):
    """How often to save ("30min" or a number of steps) and how many to keep.

    ``milestones``: every so many steps of a phase a checkpoint is written and kept for ever.
    """

    every: Every = machine("30min")
    keep: int = machine(3, ge=1)
    milestones: int | None = machine(None, ge=1)

    @property
    def every_steps(self) -> int | None:
        """Steps between saves, if counted in steps."""
        return self.every if isinstance(self.every, int) else None

    @property
    def every_s(self) -> float | None:
        """Seconds between saves, if counted in time."""
        if isinstance(self.every, int):
            return None
        number, unit = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", self.every).groups()  # type: ignore[union-attr]
        return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


class FamilyRecipe(Section):
    """Distils every student from one frozen teacher, in one job."""

    name: Name = machine()
    seed: int = science(0, ge=0)
    teacher: TeacherSource = science()
    students: Annotated[tuple[Student, ...], Strict(False)] = science(min_length=1)
    data: DataSpec = science()
    crops: CropsSpec = science(CropsSpec())
    masks: MasksSpec = science(MasksSpec())
    objective: ObjectiveSpec = science(ObjectiveSpec())
    schedule: FamilyScheduleSpec = science()
    engine: EngineSpec = science(EngineSpec())
    checkpoint: CheckpointSpec = machine(CheckpointSpec())

    def input_size_of(self, name: str) -> int:
        """Pixels per side that a finished network is scored at, the teacher included."""
        from teacher.shapes import scaled_size

        scales = {student.label: student.crop_scale for student in self.students}
        return scaled_size(self.crops.input_size, scales.get(name, 1.0))


class TeacherRecipe(Section):
    """Pretrains a teacher in stages."""

    name: Name = machine()
    seed: int = science(0, ge=0)
    model: Model = science()
    heads: HeadsSpec = science(HeadsSpec())
    data: DataSpec = science()
    crops: CropsSpec = science(CropsSpec())
    masks: MasksSpec = science(MasksSpec())
    schedule: TeacherScheduleSpec = science()
    stages: Annotated[tuple[StageSpec, ...], Strict(False)] = science(min_length=1)
    engine: EngineSpec = science(EngineSpec())
    checkpoint: CheckpointSpec = machine(CheckpointSpec())

    def at_stage(self, stage: StageSpec) -> "TeacherRecipe":
        """The recipe with the schedule that a stage has; the other stages keep theirs."""
        by_key = {"lr": stage.lr, "batch": stage.batch, "ema": stage.ema}
        given = {key: value for key, value in by_key.items() if value is not None}
        stages = tuple(
            each.model_copy(update={"batch": each.batch or self.schedule.batch})
            for each in self.stages
        )
        settings = self.schedule.model_copy(update=given)
        return self.model_copy(update={"schedule": settings, "stages": stages})

    def first_step(self, stage: StageSpec) -> int:
        """Steps of the stages before one."""
        names = [each.name for each in self.stages]
        return sum(each.steps for each in self.stages[: names.index(stage.name)])


Recipe = FamilyRecipe | TeacherRecipe
