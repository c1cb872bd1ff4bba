"""A stage of pretraining to a plan and what it needs: one network on all ranks, which teaches itself."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from distill.plan.flops import (
    DEFAULT_DEVICE,
    CropShapes,
    Device,
    backbone_tflops,
    teaching_tflops,
    training_tflops,
)
from distill.plan.from_recipe import (
    ONLINE,
    in_slices,
    kinds_of,
    shape_of_recipe,
    training_of,
)
from distill.plan.memory import Footprint, pretraining_footprint
from distill.plan.micro_batches import AUTO, fitted_alone, has_room, in_micro_batches
from distill.plan.placement import NetworkCost
from distill.plan.plan import Plan, PlanOptions, make_plan
from distill.plan.requirements import require_as_many_parts, require_full_groups
from distill.recipe.keys import TeacherRecipe
from distill.recipe.schedules import StageSpec
from teacher.shapes import ViTSpec


def plan_stage(
    recipe: TeacherRecipe, stage: StageSpec, num_ranks: int, device: Device = DEFAULT_DEVICE
) -> Plan:
    """One network on all ranks, which teaches itself; seconds are means over the stage's sizes of crops."""
    first = recipe.stages[0]
    if recipe.engine.micro_batch == AUTO:
        plans = _fitted_stages(recipe, num_ranks, device)
        return plans[recipe.stages.index(stage)]
    plan, before = (_plan_alone(recipe, each, num_ranks, device) for each in (stage, first))
    (each,), (of_first,) = plan.placements, before.placements
    what, counts = f"{each.num_parts} micro-batches a step", (each.num_parts, of_first.num_parts)
    require_as_many_parts(recipe, what, counts, (stage.name, first.name))
    return plan


def _fitted_stages(recipe: TeacherRecipe, num_ranks: int, device: Device) -> tuple[Plan, ...]:
    """The plans of all stages with as few micro-batches as fit, as many in each."""

    def footprints(plans: Sequence[Plan]) -> list[Footprint]:
        return [stage_footprint(recipe, *pair) for pair in zip(recipe.stages, plans, strict=True)]

    uncut = in_slices(recipe)
    plans = [_plan_alone(uncut, stage, num_ranks, device) for stage in recipe.stages]
    if has_room(footprints(plans), device.memory_gib):
        return tuple(plans)
    plans = [_plan_alone(recipe, stage, num_ranks, device) for stage in recipe.stages]
    bound = [ONLINE] if recipe.engine.zero == 3 else []
    return fitted_alone(plans, footprints, device.memory_gib, bound)


def _plan_alone(recipe: TeacherRecipe, stage: StageSpec, num_ranks: int, device: Device) -> Plan:
    """A stage by itself."""
    shape = shape_of_recipe(recipe)
    assert shape.heads is not None, "a pretrained teacher has heads"
    train_s = teach_s = 0.0
    for share, shapes, anchor_size in stage_shapes(recipe, stage):
        survival = 1.0 - recipe.schedule.drop_path
        again = recipe.engine.activation_checkpointing
        work = training_tflops(shape.spec, shape.heads, shapes, survival=survival, is_twice=again)
        train_s += share * device.seconds(work)
        work = teaching_tflops(shape.spec, shape.heads, shapes)
        if anchor_size is not None:
            work += 2 * backbone_tflops(shape.spec, anchor_size)
        teach_s += share * device.seconds(work)
    in_groups = recipe.engine.micro_batch is not None
    batch = recipe.at_stage(stage).schedule.batch
    works = [NetworkCost(ONLINE, train_s, num_ranks)]
    plan = make_plan(works, teach_s, batch, num_ranks, PlanOptions(has_full_groups=in_groups))
    plan = in_micro_batches(plan, recipe.engine.micro_batch)
    require_full_groups(recipe, plan)
    return plan


def stage_shapes(
    recipe: TeacherRecipe, stage: StageSpec
) -> Iterator[tuple[float, CropShapes, int | None]]:
    """Each kind of batch of a stage: its share, its crops, and the size of its anchor crops."""
    return kinds_of(recipe, stage, recipe.model.backbone_spec())


def stage_footprint(recipe: TeacherRecipe, stage: StageSpec, plan: Plan) -> Footprint:
    """Memory of a stage of pretraining, at its largest crops."""
    shape = shape_of_recipe(recipe)
    assert shape.heads is not None, "a pretrained teacher has heads"
    assert isinstance(shape.spec, ViTSpec), "a pretrained teacher is a ViT"
    kinds = [shapes for _, shapes, _ in stage_shapes(recipe, stage)]
    return pretraining_footprint(
        plan,
        shape.spec,
        shape.heads,
        kinds,
        replace(training_of(recipe), survival=1.0 - recipe.schedule.drop_path),
        has_anchor=stage.gram is not None,
    )
