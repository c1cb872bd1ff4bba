"""How near each student came to its teacher while it trained: its EMA in every checkpoint of the family that was kept.

The images, the preparation and the figures are those of the finished run (``distill.evaluate.scoring``); a checkpoint
is read for the EMA alone. Without labels there is closeness and no k-NN.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from distill.evaluate.over_steps import load_ema
from distill.evaluate.scoring import spaced
from distill.job.prepare import CHECKPOINTS, read_job
from distill.job.to_data import decoding_of
from distill.protocols.closeness import FEWEST_IMAGES, Closeness, closeness
from distill.protocols.images import (
    Extracted,
    Preparation,
    ReadSplit,
    extract_all,
    read_preparation,
    read_split,
    read_splits,
    read_unlabelled,
)
from distill.protocols.knn import BASELINE_PX, knn
from distill.recipe.keys import FamilyRecipe
from distill.runfolder.manifest import checkpoints
from distill.runfolder.progress import add_progress
from distill.runfolder.status import KNN_K, TEACHER
from distill.runfolder.tensor_file import SUFFIX
from distill.weights.load import load_backbone
from students.shapes import BackboneSpec

CPU = torch.device("cpu")


@dataclass(frozen=True)
class StudentStep:
    """A student after ``step`` steps of the family; ``knn`` is None without labels."""

    student: str
    step: int
    knn: float | None
    class_token: Closeness
    patch: Closeness

    @property
    def line(self) -> str:
        """As it is printed."""
        score = "" if self.knn is None else f", k-NN {self.knn:.3f}"
        return (
            f"family step {self.step}: {self.student} shares {self.class_token.mutual_knn:.3f} of class and "
            f"{self.patch.mutual_knn:.3f} of patch neighbours with the teacher, CKA {self.class_token.cka:.3f}{score}"
        )


def students_over_steps(run_folder: Path, say: Callable[[str], None]) -> list[StudentStep]:
    """Every student in each kept checkpoint, oldest first, added to ``students-progress.json``; empty without any."""
    job = read_job(run_folder)
    if not isinstance(job.recipe, FamilyRecipe):
        return []
    specs = {student.label: student.backbone_spec() for student in job.recipe.students}
    found = student_checkpoints(run_folder, job.recipe, specs)
    if not found:
        return []
    scorer = StudentScorer(run_folder, job.recipe, job.teacher_paths[0], specs)
    if not scorer.has_images:
        say(f"agreement: fewer than {FEWEST_IMAGES} images to compare neighbours on")
        return []
    history = []
    for step, name, path in found:
        history.append(scorer.score(step, name, load_ema(path, specs[name])))
        say(history[-1].line)
    add_progress(run_folder, [asdict(each) for each in history])
    return history


def student_checkpoints(
    run_folder: Path, recipe: FamilyRecipe, names: Iterable[str]
) -> list[tuple[int, str, Path]]:
    """Step of the family, name and file of the students in each kept checkpoint of the family, oldest first."""
    return [
        (recipe.step_of(manifest.phase, manifest.step), name, path / f"{name}{SUFFIX}")
        for path, manifest in reversed(checkpoints(run_folder / CHECKPOINTS))
        for name in names
        if f"{name}{SUFFIX}" in manifest.files
    ]


class StudentScorer:
    """Images of a run, decoded once, and its teacher's features of them.

    ``specs``: of the students by name; a teacher that the run trains is there when this is made.
    """

    def __init__(
        self,
        run_folder: Path,
        recipe: FamilyRecipe,
        teacher_path: Path,
        specs: Mapping[str, BackboneSpec],
    ) -> None:
        data = recipe.data
        usual = Preparation(
            recipe.input_size_of(TEACHER), data.mean, data.std, decoding_of(data).background
        )
        teacher, spec = load_backbone(teacher_path)
        self._preparations = {
            name: self._preparation(
                run_folder / "students" / name,
                each,
                replace(usual, size=recipe.input_size_of(name)),
            )
            for name, each in specs.items()
        }
        preparation = self._preparation(teacher_path, spec, usual)
        train, test, self._reason = read_splits(run_folder, KNN_K)
        splits = [read_unlabelled(run_folder)[0]] if self._reason else [train, test]
        sides = [each.size for each in (*self._preparations.values(), preparation)]
        self.parts: list[ReadSplit] = [
            read_split(each, BASELINE_PX, usual.background, sides) for each in splits
        ]
        self._teacher = self._features(teacher, preparation, self.parts[-1])

    @property
    def has_images(self) -> bool:
        """Whether there are enough images to compare neighbours on."""
        return len(self.parts[-1].pixels) >= FEWEST_IMAGES

    @staticmethod
    def _preparation(path: Path, spec: BackboneSpec, usual: Preparation) -> Preparation:
        stated = read_preparation(path, spec.stride, usual)
        return replace(stated, background=usual.background)

    @staticmethod
    def _features(
        backbone: torch.nn.Module, preparation: Preparation, part: ReadSplit
    ) -> Extracted:
        return extract_all(backbone, part.batches(preparation), preparation, device=CPU)

    def score(self, step: int, name: str, backbone: torch.nn.Module) -> StudentStep:
        """One student as it was after ``step`` steps."""
        found = [self._features(backbone, self._preparations[name], part) for part in self.parts]
        score = None
        if not self._reason:
            labels = [part.split.labels for part in self.parts]
            score = knn(found[0].class_token, labels[0], found[1].class_token, labels[1])
        rows = spaced(len(self.parts[-1].pixels))
        near = {
            kind: closeness(getattr(found[-1], kind)[rows], getattr(self._teacher, kind)[rows])
            for kind in ("class_token", "patch")
        }
        return StudentStep(name, step, score, near["class_token"], near["patch"])
