"""Scores of the students while they train (``evaluate.every``): closeness to the teacher and k-NN of newer and newer checkpoints.

A checkpoint is all that this reads of a job, so no rank waits for it. The newest checkpoint that is due is scored; those
that came while the one before was scored are passed over, which is noted once. The EMA of all students is read
first, since a checkpoint may be removed while it is scored; where it is gone already, the next one is taken.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from torch import nn

from distill.errors import UserError
from distill.evaluate.cost import MOST_GFLOP_ON_CPU
from distill.evaluate.over_steps import load_ema
from distill.evaluate.students_over_steps import StudentScorer
from distill.job.prepare import CHECKPOINTS, Job, read_job
from distill.protocols.closeness import FEWEST_IMAGES
from distill.recipe.interval_keys import EvaluateSpec
from distill.recipe.keys import FamilyRecipe, Recipe, is_family_phase
from distill.runfolder.events import Event, note
from distill.runfolder.manifest import MANIFEST, Manifest, checkpoints
from distill.runfolder.progress import add_progress, cut_progress, read_progress
from distill.runfolder.tensor_file import SUFFIX
from distill.screen.words import duration
from distill.weights.load import shape_of

LEFT_MESSAGE = "students are not scored at intervals"
EARLY = (
    0.9  # of an interval: checkpoints of the same interval are seconds apart, as their votes fall
)

Found = list[tuple[Path, Manifest]]


def due(found: Found, every: EvaluateSpec, last: tuple[int, float]) -> Found:
    """Of checkpoints, oldest first, those that are an interval apart from the one before; ``last``: step and time of the last that was scored."""
    chosen, (step, unix) = Found(), last
    for path, manifest in found:
        if every.every_steps is not None:
            is_due = manifest.step // every.every_steps > step // every.every_steps
        else:
            is_due = manifest.step > step and _written(path) - unix >= EARLY * (every.every_s or 0)
        if is_due:
            chosen.append((path, manifest))
            step, unix = manifest.step, _written(path)
    return chosen


def _written(path: Path) -> float:
    """When a checkpoint was complete; a long time ago where it is gone."""
    try:
        return (path / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0


def _checkpoints(run_folder: Path, read_recipe: Callable[[], Recipe]) -> Found:
    """Of the family, oldest first; steps are counted from the family's start. The recipe is read where there are any."""
    found = [
        each for each in checkpoints(run_folder / CHECKPOINTS) if is_family_phase(each[1].phase)
    ]
    if not found:
        return []
    recipe = read_recipe()
    assert isinstance(recipe, FamilyRecipe), "students are a family's"
    steps = [recipe.step_of(manifest.phase, manifest.step) for _, manifest in found]
    return [
        (path, manifest.model_copy(update={"step": step}))
        for (path, manifest), step in zip(reversed(found), reversed(steps), strict=True)
    ]


def forget_later(run_folder: Path) -> None:
    """Removes scores of steps that are trained anew: those after the newest checkpoint. Call when training starts."""
    newest = _checkpoints(run_folder, lambda: read_job(run_folder).recipe)[-1:]
    cut_progress(run_folder, newest[0][1].step if newest else 0)


class IntervalScorer:
    """Scores due checkpoints of one run; images and the teacher's features are read once, for the first."""

    def __init__(self, run_folder: Path, say: Callable[[str], None]) -> None:
        """Goes on after the last step that was scored."""
        self._folder, self._say = run_folder, say
        self._scorer: StudentScorer | None = None
        self._has_noted, self._is_over = False, False
        scored = max((each.step for each in read_progress(run_folder)), default=0)
        found = self._checkpoints()
        times = [_written(path) for path, manifest in found if manifest.step == scored]
        self._last = scored, max(times, default=0.0)

    @cached_property
    def _job(self) -> Job:
        """Read once: it is the same for as long as ranks train."""
        return read_job(self._folder)

    def _checkpoints(self) -> Found:
        return _checkpoints(self._folder, lambda: self._job.recipe)

    def score_due(self, *, is_end: bool = False) -> bool:
        """Scores the newest checkpoint if it is due, or not scored yet at the end of a run; whether it was.

        Raises:
            UserError: the teacher or the images cannot be read.
        """
        found = [] if self._is_over else self._checkpoints()
        if not found:
            return False
        job = self._job
        if not isinstance(job.recipe, FamilyRecipe) or job.recipe.evaluate.every is None:
            return False
        chosen = due(found, job.recipe.evaluate, self._last)
        if is_end and found[-1][1].step > self._last[0]:
            chosen = [found[-1]]
        if not chosen:
            return False
        started = time.monotonic()
        path, manifest = chosen[-1]
        if not self._score(job, job.recipe, path, manifest):
            return False
        if len(chosen) > 1:
            self._note_passed_over([each.step for _, each in chosen[:-1]], job.recipe.evaluate)
        self._last = manifest.step, _written(path)
        self._say(f"scored step {manifest.step} in {duration(time.monotonic() - started)}")
        return True

    def _score(self, job: Job, recipe: FamilyRecipe, path: Path, manifest: Manifest) -> bool:
        """Whether the students of a checkpoint were scored; not where it is gone or there is nothing to score on."""
        specs = {student.label: student.backbone_spec() for student in recipe.students}
        backbones: dict[str, nn.Module] = {}
        try:
            for name, spec in specs.items():
                if f"{name}{SUFFIX}" in manifest.files:
                    backbones[name] = load_ema(path / f"{name}{SUFFIX}", spec)
        except FileNotFoundError:  # removed for a newer one
            return False
        if self._scorer is None:
            teacher = job.teacher_paths[0]
            if shape_of(teacher).flops(recipe.crops.input_size) / 1e9 > MOST_GFLOP_ON_CPU:
                return self._end("the teacher takes too long on a CPU")
            self._scorer = StudentScorer(self._folder, recipe, teacher, specs)
        if not self._scorer.has_images:
            return self._end(f"fewer than {FEWEST_IMAGES} images to compare neighbours on")
        found = [
            self._scorer.score(manifest.step, name, backbone)
            for name, backbone in backbones.items()
        ]
        add_progress(self._folder, [asdict(each) for each in found])
        for each in found:
            self._say(each.line)
        return True

    def _end(self, reason: str) -> bool:
        """No checkpoint of this run can be scored; noted once."""
        self._is_over = True
        note(self._folder, Event("skipped", f"{LEFT_MESSAGE}: {reason}"))
        self._say(reason)
        return False

    def _note_passed_over(self, steps: list[int], every: EvaluateSpec) -> None:
        listed = ", ".join(map(str, steps))
        text = (
            f"no scores of step {listed}: scoring takes longer than evaluate.every = {every.every}"
        )
        self._say(text)
        if not self._has_noted:
            note(self._folder, Event("skipped", f"{text}; the newest is scored each time"))
        self._has_noted = True


def score_after(run_folder: Path, say: Callable[[str], None]) -> list[str]:
    """Scores the last step where the process beside training has not; a line for people where that fails, which costs no run."""
    try:
        IntervalScorer(run_folder, say).score_due(is_end=True)
    except (UserError, OSError) as error:
        return [f"{LEFT_MESSAGE} ({error}): `distill eval {run_folder}` tries again"]
    return []
