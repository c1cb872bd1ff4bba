"""Students as folders at the milestones of a run: ``RUN/milestones/family-STEP/NAME``, written beside training and after it.

A milestone's checkpoint is never removed, so that any process writes its folders from the EMA in it at any time. A
milestone appears complete, with all students and their scores, or not at all, and is never written again.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.evaluate.cost import MOST_GFLOP_ON_CPU
from distill.evaluate.over_steps import load_ema, read_ema
from distill.evaluate.students_over_steps import StudentScorer
from distill.export.save import ExportFacts, fingerprint, write_backbone
from distill.job.origin import init_record, licences_of_network, student_record
from distill.job.prepare import CHECKPOINTS, Job, read_job
from distill.job.write_networks import count_images_of
from distill.recipe.keys import FamilyRecipe, is_family_phase
from distill.runfolder.files import make_folder, replaced
from distill.runfolder.manifest import Manifest, checkpoint_name, checkpoints
from distill.runfolder.status import TEACHER
from distill.runfolder.tensor_file import SUFFIX
from distill.weights.load import load_backbone, shape_of
from students.shapes import BackboneSpec

FOLDER = "milestones"
LEFT_MESSAGE = "students of milestones are not written"


def left_milestones(run_folder: Path) -> list[tuple[Path, Manifest]]:
    """Checkpoints of milestones of the family without a folder of their students, oldest first."""
    return [
        (path, manifest)
        for path, manifest in reversed(checkpoints(run_folder / CHECKPOINTS))
        if manifest.is_milestone
        and is_family_phase(manifest.phase)
        and not (run_folder / FOLDER / checkpoint_name(manifest.phase, manifest.step)).exists()
    ]


class MilestoneWriter:
    """Writes the students of milestones; images and the teacher's features are read once, for the first."""

    def __init__(self, run_folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = run_folder, say
        self._scorer: StudentScorer | None = None
        self._teacher: tuple[BackboneSpec, str] | None = None

    def write_left(self) -> int:
        """Writes every milestone that has no folder yet; one process at a time.

        Returns:
            How many were written.

        Raises:
            UserError: a checkpoint, the teacher or the images cannot be read.
            OSError: the disk takes no more.
        """
        left = left_milestones(self._folder)
        if not left:
            return 0
        job = read_job(self._folder)
        if not isinstance(job.recipe, FamilyRecipe) or not job.recipe.checkpoint.export:
            return 0
        for path, manifest in left:
            self._write(job, job.recipe, path, manifest)
        return len(left)

    def _write(self, job: Job, recipe: FamilyRecipe, path: Path, manifest: Manifest) -> None:
        specs = {student.label: student.backbone_spec() for student in recipe.students}
        inits = {student.label: student.init for student in recipe.students}
        if self._teacher is None:
            self._teacher = self._read_teacher(job.teacher_paths[0], recipe, specs)
        images = count_images_of(job, "train")
        step = recipe.step_of(manifest.phase, manifest.step)
        record = student_record(job, *self._teacher, images, step)
        target = self._folder / FOLDER / checkpoint_name(manifest.phase, manifest.step)
        make_folder(target.parent)
        with replaced(target) as aside:
            for name in specs:
                file = path / f"{name}{SUFFIX}"
                if file.name not in manifest.files:  # parked before it was trained
                    continue
                scores = self._score(step, name, file, specs[name])
                started = init_record(inits[name])
                facts = ExportFacts(
                    recipe.input_size_of(name),
                    recipe.data.mean,
                    recipe.data.std,
                    {**record, **started, "milestone": {"step": step, **scores}},
                    licences_of_network(self._folder, name),
                    {TEACHER: {}, "students": {name: {"knn": scores.get("knn")}}},
                )
                write_backbone(aside / name, read_ema(file), specs[name], facts)
        self._say(f"wrote {FOLDER}/{target.name}")

    def _read_teacher(
        self, path: Path, recipe: FamilyRecipe, specs: Mapping[str, BackboneSpec]
    ) -> tuple[BackboneSpec, str]:
        """Shape and fingerprint of the teacher, whose features students are compared with; one too large for that is not loaded."""
        spec = shape_of(path)
        if spec.flops(recipe.crops.input_size) / 1e9 > MOST_GFLOP_ON_CPU:
            return spec, "unknown"
        self._scorer = StudentScorer(self._folder, recipe, path, specs)
        return spec, fingerprint(load_backbone(path)[0].state_dict())

    def _score(self, step: int, name: str, file: Path, spec: BackboneSpec) -> dict[str, Any]:
        """Scores of a student for its record, or why there are none."""
        if self._scorer is None:
            reason = "the teacher takes too long on a CPU; see distill eval RUN --over-steps"
            return {"knn": None, "reason": reason}
        if not self._scorer.has_images:
            return {"knn": None, "reason": "too few images to compare neighbours on"}
        found = self._scorer.score(step, name, load_ema(file, spec))
        self._say(found.line)
        near = {"class": asdict(found.class_token), "patch": asdict(found.patch)}
        return {"knn": found.knn, "agreement": near}


def write_after(run_folder: Path, say: Callable[[str], None]) -> list[str]:
    """Writes what the process beside training has left; a line for people where that fails, which costs no run."""
    try:
        MilestoneWriter(run_folder, say).write_left()
    except (UserError, OSError) as error:
        return [f"{LEFT_MESSAGE} ({error}): `distill eval {run_folder}` tries again"]
    return []
