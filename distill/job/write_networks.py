"""The networks of a run as folders that other programs read: its teacher, and every student that was trained."""

import torch
import torch.distributed as dist

from distill.data.index import ImageIndex
from distill.export.licences import Licences, Terms, licences_in
from distill.export.save import ExportFacts, write_backbone, write_heads
from distill.job.origin import (
    LICENCES,
    init_record,
    licences_of_network,
    pretrained_record,
    student_record,
)
from distill.job.prepare import Job
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.runfolder.files import remove
from distill.runfolder.parked import read_parked
from distill.runfolder.status import TRAINED_HEADS
from distill.train.phase import Phase
from students.shapes import BackboneSpec


def write_teacher(
    job: Job,
    recipe: TeacherRecipe,
    weights: dict[str, torch.Tensor],
    spec: BackboneSpec,
    steps: int,
) -> None:
    """Writes what pretraining made: backbone and heads in fp32, by the rank that calls."""
    facts = ExportFacts(
        recipe.crops.input_size,
        recipe.data.mean,
        recipe.data.std,
        pretrained_record(job, recipe, count_images_of(job, "teacher"), steps),
        Licences((Terms(recipe.name, is_pretrained=True),))
        if recipe.model.init is None
        else licences_in(job.run_folder / LICENCES),
    )
    folder = job.run_folder / "teacher"
    write_heads(folder / TRAINED_HEADS, weights)
    write_backbone(folder, _backbone_only(weights), spec, facts)


def write_students(
    job: Job,
    recipe: FamilyRecipe,
    phase: Phase,
    teacher_spec: BackboneSpec,
    teacher_fingerprint: str,
) -> None:
    """Writes every student's EMA, by the first rank of its group; none of a student that was never trained. Collective over the world."""
    num_images = count_images_of(job, "train")
    inits = {student.label: student.init for student in recipe.students}
    specs = {student.label: student.backbone_spec() for student in recipe.students}
    mean, std = recipe.data.mean, recipe.data.std
    for trainer in phase.trainers:
        name, is_first = trainer.name, trainer.placement.first_rank == dist.get_rank()
        weights = trainer.ema(collect=is_first)
        if not is_first:
            continue
        folder, steps = job.run_folder / "students" / name, trainer.steps_applied()
        if not steps:
            remove(folder)  # of an earlier student of this name
            continue
        provenance = student_record(job, teacher_spec, teacher_fingerprint, num_images, steps)
        provenance |= init_record(inits[name])
        parked = read_parked(job.run_folder, name)
        if parked is not None:
            provenance["parked"] = parked.describe()
        licences = licences_of_network(job.run_folder, name)
        facts = ExportFacts(recipe.input_size_of(name), mean, std, provenance, licences)
        write_backbone(folder, _backbone_only(weights), specs[name], facts)
    dist.barrier()


def count_images_of(job: Job, which: str) -> int:
    """Images of an index of the run, such as ``train``."""
    return len(ImageIndex.load(job.run_folder / "data" / which))


def _backbone_only(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("backbone."): tensor
        for name, tensor in weights.items()
        if name.startswith("backbone.")
    }
