"""What a benchmark compares: the recipe and the plan of every mode."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distill.plan.costs import read_costs
from distill.plan.flops import DEFAULT_DEVICE
from distill.plan.from_recipe import TeacherShape, plan_family
from distill.plan.plan import Plan, timed_by
from distill.recipe.keys import FamilyRecipe

OURS, SAVING = "ours", "saving"  # the same job, without and with a save in each turn
PUBLISHED, BY_FLOPS, SEPARATE = "published", "by FLOPs", "separate"


def modes_of(
    family: FamilyRecipe, against: Sequence[str], num_ranks: int
) -> dict[str, FamilyRecipe]:
    """The recipe of every mode, by name: ``ours``, ``published``, ``by FLOPs``, ``separate NAME``."""
    modes = {OURS: family}
    if "flops" in against:
        modes[BY_FLOPS] = family
    if "published" in against:
        engine = family.engine.model_copy(
            update={"exchange": "all_gather", "lookahead": 0, "balance": 0}
        )
        modes[PUBLISHED] = family.model_copy(update={"engine": engine})
    if "separate" in against:
        for student in family.students:
            alone = student.model_copy(update={"ranks": num_ranks})
            modes[f"{SEPARATE} {student.label}"] = family.model_copy(update={"students": (alone,)})
    return modes


def plan_mode(
    mode: str, recipe: FamilyRecipe, shape: TeacherShape, num_ranks: int, costs: str | None
) -> Plan:
    """The plan of a mode; ``costs``: a file of seconds per image, which all modes take and all but ``by FLOPs`` are placed by.

    Raises:
        PlanError: the recipe cannot run on so many ranks, or the file has not its networks.
    """
    if costs is None:
        return plan_family(recipe, shape, num_ranks)
    device = replace(DEFAULT_DEVICE, costs=read_costs(Path(costs)))
    plan = plan_family(recipe, shape, num_ranks, device)
    if mode != BY_FLOPS:
        return plan
    return timed_by(plan_family(recipe, shape, num_ranks), plan.teach_s, plan.image_s)
