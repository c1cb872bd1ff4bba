"""Networks for ``distill look``: those of folders, files and runs, and one network in every kept checkpoint of its run."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from distill.errors import RecipeError
from distill.evaluate.files import named_networks, split_name, stated_preparation
from distill.evaluate.over_steps import checkpoints_of, load_ema
from distill.evaluate.students_over_steps import student_checkpoints
from distill.job.prepare import read_job
from distill.protocols.images import Preparation
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.report.look import Say, Viewed
from distill.runfolder.status import TEACHER
from distill.weights.load import load_backbone, shape_of
from distill.weights.outside import is_outside, load_outside
from students.shapes import BackboneSpec


def networks_of(paths: Sequence[Path], say: Say) -> list[Viewed]:
    """Every network that is named, in that order; a run stands for its teacher and students.

    Raises:
        UserError: one is not there, or is no backbone.
    """
    return [_viewed(name, path, spec, say) for name, path, spec in named_networks(paths)]


def _viewed(name: str, path: Path, spec: BackboneSpec | None, say: Say) -> Viewed:
    if spec is None and path.is_dir() and is_outside(path):
        stride = load_outside(path).stride
        return Viewed(
            name, partial(load_outside, path), None, stated_preparation(name, path, stride, say)
        )
    spec = spec or shape_of(path)
    load = partial(_load, path, spec)
    return Viewed(name, load, spec, stated_preparation(name, path, spec.stride, say))


def _load(path: Path, spec: BackboneSpec) -> nn.Module:
    return load_backbone(path, spec=spec)[0]


def networks_over_steps(path: Path) -> list[Viewed]:
    """The EMA of each network of a run, or of the one behind the colon, in every kept checkpoint, oldest first.

    Raises:
        RecipeError: no checkpoint holds such a network.
    """
    run, wanted = split_name(path)
    job = read_job(run)
    teacher = job.recipe if isinstance(job.recipe, TeacherRecipe) else job.teacher_recipe
    data = job.recipe.data
    preparation = Preparation(job.recipe.crops.input_size, data.mean, data.std)
    view: Callable[..., Viewed] = partial(_checkpoint, preparation)
    found = []
    if teacher is not None:
        mine = teacher.data
        of_teacher = replace(preparation, mean=mine.mean, std=mine.std)
        spec = teacher.model.backbone_spec()
        found += [
            _checkpoint(of_teacher, spec, TEACHER, stage, step, file)
            for stage, step, file in checkpoints_of(run, teacher)
        ]
    if isinstance(job.recipe, FamilyRecipe):
        specs = {student.label: student.backbone_spec() for student in job.recipe.students}
        found += [
            view(specs[name], name, "family", step, file)
            for step, name, file in student_checkpoints(run, job.recipe, specs)
        ]
    names = list(dict.fromkeys(each.group for each in found))
    chosen = [each for each in found if wanted in ("", each.group)]
    if not chosen:
        raise RecipeError(
            f"{path}: no checkpoint with {wanted or 'a network'} in it",
            fix=f"Its checkpoints hold: {', '.join(names)}."
            if names
            else "Train with checkpoint.every=STEPS checkpoint.keep=N to keep some.",
        )
    return sorted(chosen, key=lambda each: names.index(each.group))


def _checkpoint(
    preparation: Preparation, spec: BackboneSpec, name: str, phase: str, step: int, file: Path
) -> Viewed:
    return Viewed(f"step {step}", partial(load_ema, file, spec), spec, preparation, phase, name)
