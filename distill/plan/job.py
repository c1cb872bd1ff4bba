"""The plans of all parts of a job, and whether each fits on its devices; if not, the nearest plan that does."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from distill.errors import PlanError
from distill.plan.flops import DEFAULT_DEVICE, Device
from distill.plan.from_recipe import (
    TeacherShape,
    family_footprint,
    fitting_footprint_of,
    later_plans,
    plan_family,
    plan_fitting,
)
from distill.plan.memory import Footprint
from distill.plan.plan import Plan
from distill.plan.pretraining import plan_stage, stage_footprint
from distill.plan.teacher_source import teacher_shape, with_teacher_stats
from distill.recipe.keys import (
    HEADS_PHASE,
    FamilyRecipe,
    TeacherRecipe,
    is_family_phase,
    is_ours,
)
from distill.recipe.schedules import FamilyStageSpec

MORE_RANKS = (1, 2, 4, 8, 16)  # times the ranks requested: what is tried when memory is short
SMALLER_MICRO_BATCHES = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class JobPlan:
    """The plan of one part of a job and what it needs; ``later``: plans for when students are finished."""

    name: str
    plan: Plan
    num_steps: int
    footprint: Footprint
    later: tuple[tuple[int, Plan], ...] = ()

    @property
    def seconds(self) -> float:
        """Of all steps together."""
        starts = [(0, self.plan), *self.later, (self.num_steps, self.plan)]
        return sum((stop - start) * plan.step_s for (start, plan), (stop, _) in pairwise(starts))

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        days = self.seconds / 86_400
        facts = {"phase": self.name, "steps": self.num_steps, "days": days}
        return {**self.plan.to_json(), **self.footprint.to_json(), **facts}


def check_job(
    recipe: FamilyRecipe | TeacherRecipe,
    teacher_recipe: TeacherRecipe | None,
    num_ranks: int,
    device: Device = DEFAULT_DEVICE,
    *,
    has_files: bool = True,
) -> tuple[JobPlan, ...]:
    """The plans of all parts for ``num_ranks`` ranks, pretraining first.

    ``has_files=False`` plans from ``teacher.arch`` where the teacher's files are not there.

    Raises:
        PlanError: the recipe cannot run on this many ranks.
        CheckpointError: a teacher's files are missing or do not fit.
    """
    plans = []
    pretrained = recipe if isinstance(recipe, TeacherRecipe) else teacher_recipe
    if pretrained is not None:
        for stage in pretrained.stages:
            plan = plan_stage(pretrained, stage, num_ranks, device)
            plans.append(
                JobPlan(stage.name, plan, stage.steps, stage_footprint(pretrained, stage, plan))
            )
    if isinstance(recipe, FamilyRecipe):
        with_teacher_stats(recipe)  # refuses others than the teacher's
        shape = teacher_shape(recipe, teacher_recipe, has_files=has_files)
        if recipe.teacher.heads_mode == "fit":
            fitting, footprint = _planned(recipe, shape, HEADS_PHASE, num_ranks, device)
            plans.append(JobPlan(HEADS_PHASE, fitting, recipe.teacher.fit.steps, footprint))
        plans += [_stage_plan(recipe, shape, stage, num_ranks, device) for stage in recipe.parts]
    return tuple(plans)


def _stage_plan(
    recipe: FamilyRecipe,
    shape: TeacherShape,
    stage: FamilyStageSpec,
    num_ranks: int,
    device: Device,
) -> JobPlan:
    """A stage of the family, with the plans for when students are finished, by its steps."""
    name, first = recipe.phase_of(stage), recipe.first_step(stage)
    plan, footprint = _planned(recipe, shape, name, num_ranks, device)
    later = tuple(
        (max(0, step - first), each)
        for step, each in later_plans(recipe, plan)
        if step - first < stage.steps
    )
    return JobPlan(name, plan, stage.steps, footprint, later)


def main_plan(plans: Sequence[JobPlan]) -> JobPlan:
    """The part that ``plan.json`` and ``--json`` hold: the family's first stage, without a family the teacher's last."""
    return next((job for job in plans if is_family_phase(job.name)), plans[-1])


def require_fit(
    job: JobPlan,
    recipe: FamilyRecipe | TeacherRecipe,
    teacher_recipe: TeacherRecipe | None,
    device: Device,
) -> None:
    """Refuses a plan that does not fit on its device.

    Raises:
        PlanError: names the part that is largest, and the nearest plan that fits.
    """
    if job.footprint.fullest.total <= device.memory_gib:
        return
    trained = recipe if isinstance(recipe, TeacherRecipe) else teacher_recipe
    if isinstance(recipe, FamilyRecipe) and is_ours(job.name):
        shape = teacher_shape(recipe, teacher_recipe, has_files=False)
        fix = _nearest_fit(recipe, shape, job, device)
    else:
        assert trained is not None, "a stage without a teacher recipe"
        fix = _nearest_stage_fit(trained, job, device)
    text = f"{job.name}: rank {job.footprint.fullest_rank} needs {job.footprint.fullest.describe()}"
    raise PlanError(f"{text}; {device.name} has {device.memory_gib:.0f} GiB", fix=fix)


def _nearest_stage_fit(recipe: TeacherRecipe, job: JobPlan, device: Device) -> str:
    """The change with which a stage of pretraining fits: shard more, keep less, take more ranks."""
    stage = next(stage for stage in recipe.stages if stage.name == job.name)
    changes: tuple[dict[str, object], ...] = ({"zero": 3}, {"activation_checkpointing": True})
    for factor in MORE_RANKS:
        for micro_batch in (recipe.engine.micro_batch, *SMALLER_MICRO_BATCHES):
            for count in range(len(changes) + 1):
                update: dict[str, object] = {"micro_batch": micro_batch}
                for change in changes[:count]:
                    update |= change
                engine = recipe.engine.model_copy(update=update)
                changed = recipe.model_copy(update={"engine": engine})
                with suppress(PlanError):
                    plan = plan_stage(changed, stage, factor * job.plan.num_ranks, device)
                    found = stage_footprint(changed, stage, plan).fullest.total
                    if found <= device.memory_gib:
                        facts = recipe.engine.model_dump()
                        keys = [k for k, value in update.items() if value != facts[k]]
                        words = [f"engine.{key}={str(update[key]).lower()}" for key in keys]
                        on = [f"{factor * job.plan.num_ranks} ranks"] if factor > 1 else []
                        return f"{' '.join([*words, *on])} needs {found:.0f} GiB."
    return (
        "No number of ranks tried makes room: use a smaller network or a device with more memory."
    )


def _nearest_fit(recipe: FamilyRecipe, shape: TeacherShape, job: JobPlan, device: Device) -> str:
    """The change with which a family, or its heads, fit: smaller micro-batches if they do, then more ranks too."""
    num_ranks = job.plan.num_ranks
    for factor in MORE_RANKS:
        for micro_batch in (recipe.engine.micro_batch, *SMALLER_MICRO_BATCHES):
            engine = recipe.engine.model_copy(update={"micro_batch": micro_batch})
            changed = recipe.model_copy(update={"engine": engine})
            with suppress(PlanError):
                _, footprint = _planned(changed, shape, job.name, factor * num_ranks, device)
                found = footprint.fullest.total
                if found <= device.memory_gib:
                    on = f" on {factor * num_ranks} ranks" if factor > 1 else ""
                    return f"engine.micro_batch={micro_batch}{on} needs {found:.0f} GiB."
    return "No number of ranks tried makes room: use smaller networks or a device with more memory."


def _planned(
    recipe: FamilyRecipe, shape: TeacherShape, phase: str, num_ranks: int, device: Device
) -> tuple[Plan, Footprint]:
    """A phase of a family's job and what it needs."""
    if phase == HEADS_PHASE:
        plan = plan_fitting(recipe, shape, num_ranks, device)
        return plan, fitting_footprint_of(recipe, shape, plan)
    stage = next(each for each in recipe.parts if recipe.phase_of(each) == phase)
    plan = plan_family(recipe, shape, num_ranks, device, stage)
    return plan, family_footprint(recipe, shape, plan, stage)
