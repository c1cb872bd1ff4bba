"""Everything that happens once, before any process starts: recipe read, images indexed, run folder written.

What can be wrong with a recipe, a folder of images or a world size is found here, in one process,
with one clear line each.
"""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from distill.budget import Needs
from distill.checkpoint import find_latest
from distill.cost import DEFAULT_DEVICE, Device
from distill.data.index import ImageIndex, build_index, split
from distill.data.photographs import photograph_paths, write_tiles
from distill.data.sources import list_source
from distill.errors import CheckpointError, DataError, PlanError
from distill.metrics import write_json
from distill.plan import Plan
from distill.planning import (
    TeacherShape,
    family_needs,
    head_shapes,
    later_plans,
    plan_family,
    plan_fitting,
    plan_stage,
    shape_of_recipe,
    stage_needs,
)
from distill.recipe import (
    FAMILY_PHASE,
    HEADS_PHASE,
    DataSpec,
    FamilyRecipe,
    TeacherRecipe,
    TeacherSource,
    recipe_hash,
)
from distill.recipe_file import TEACHER_PREFIX, find_recipe, load_job, resolved_yaml
from distill.resume import describe_changes, joining_steps
from distill.weights import has_heads, head_shapes_of, shape_of
from students.catalog import CATALOG

BUILTIN_PHOTOGRAPHS = "builtin:photographs"
CHECKPOINTS = "checkpoints"  # in a run folder
RESOLVED = "recipe.resolved.yaml"
TRAINED_HEADS = "heads.safetensors"  # beside the weights of a teacher
FITTED_HEADS = "heads/teacher.safetensors"  # in a run folder


@dataclass(frozen=True)
class JobRequest:
    """What the user asked for, enough to read the recipes again in another process."""

    recipe: str
    overrides: tuple[str, ...]
    run_folder: str
    resume_command: str
    until: str | None = None  # the phase to end after; None for the whole job


@dataclass(frozen=True)
class Job:
    """A prepared run: recipes, hash, and where the teacher is or will be."""

    request: JobRequest
    recipe: FamilyRecipe | TeacherRecipe
    teacher_recipe: TeacherRecipe | None
    data_fingerprint: str

    @property
    def run_folder(self) -> Path:
        return Path(self.request.run_folder)

    @property
    def resume_command(self) -> str:
        return self.request.resume_command

    @property
    def hash(self) -> str:
        """Identifies everything that decides a network's result but its own lines: both recipes and the images."""
        shared: FamilyRecipe | TeacherRecipe = self.recipe
        if isinstance(shared, FamilyRecipe):
            shared = shared.model_copy(update={"students": ()})
        hashes = [recipe_hash(shared), self.data_fingerprint]
        if isinstance(self.recipe, FamilyRecipe):
            hashes.append(self.recipe.teacher.heads_mode)  # where the file lies does not matter
        if self.teacher_recipe is not None:
            hashes.append(recipe_hash(self.teacher_recipe))
        return "-".join(hashes)

    @property
    def networks(self) -> dict[str, str]:
        """Every student, and a hash of what the recipe says of it."""
        if not isinstance(self.recipe, FamilyRecipe):
            return {}
        return {student.label: recipe_hash(student) for student in self.recipe.students}

    @property
    def teacher_paths(self) -> tuple[Path, Path | None]:
        """The teacher's weights, and the file of its heads; None where it teaches without."""
        trained = self.run_folder / "teacher"
        if not isinstance(self.recipe, FamilyRecipe):
            return trained, trained / TRAINED_HEADS
        source = self.recipe.teacher
        weights = trained if source.weights is None else Path(source.weights)
        if source.heads_mode == "none":
            return weights, None
        if source.heads_mode == "fit":
            return weights, self.run_folder / FITTED_HEADS
        return weights, heads_file(source, weights)

    @property
    def pretrains(self) -> TeacherRecipe | None:
        """The recipe of the teacher that this run trains, if it trains one."""
        return self.recipe if isinstance(self.recipe, TeacherRecipe) else self.teacher_recipe


def read_job(run_folder: Path) -> Job:
    """The job that ``prepare`` wrote; every rank reads it."""
    stored = json.loads((run_folder / "job.json").read_text())
    request = JobRequest(
        **{**stored["request"], "overrides": tuple(stored["request"]["overrides"])}
    )
    recipe, teacher_recipe = load_job(request.recipe, request.overrides)
    return Job(request, recipe, teacher_recipe, stored["data_fingerprint"])


MORE_RANKS = (1, 2, 4, 8, 16)  # times the ranks asked for: what is tried when memory is short
SMALLER_MICRO_BATCHES = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class JobPlan:
    """The plan of one part of a job; no ``needs`` where heads are fitted, ``later`` for students that are finished early."""

    name: str
    plan: Plan
    num_steps: int
    needs: Needs | None
    later: tuple[tuple[int, Plan], ...] = ()

    @property
    def seconds(self) -> float:
        """Of all steps together."""
        starts = [(0, self.plan), *self.later, (self.num_steps, self.plan)]
        return sum((stop - start) * plan.step_s for (start, plan), (stop, _) in pairwise(starts))

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        needs = {} if self.needs is None else self.needs.to_json()
        days = self.seconds / 86_400
        own = {"phase": self.name, "steps": self.num_steps, "days": days}
        return {**self.plan.to_json(), **needs, **own}


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
                JobPlan(stage.name, plan, stage.steps, stage_needs(pretrained, stage, plan))
            )
    if isinstance(recipe, FamilyRecipe):
        shape = teacher_shape(recipe, teacher_recipe, has_files=has_files)
        if recipe.teacher.heads_mode == "fit":
            fitting = plan_fitting(recipe, shape, num_ranks, device)
            plans.append(JobPlan(HEADS_PHASE, fitting, recipe.teacher.fit.steps, None))
        family = plan_family(recipe, shape, num_ranks, device)
        needs = family_needs(recipe, shape, family)
        later = later_plans(recipe, family)
        plans.append(JobPlan(FAMILY_PHASE, family, recipe.schedule.steps, needs, later))
    return tuple(plans)


def require_fit(
    job: JobPlan,
    recipe: FamilyRecipe | TeacherRecipe,
    teacher_recipe: TeacherRecipe | None,
    device: Device,
) -> None:
    """Refuses a plan that does not fit on its device.

    Raises:
        PlanError: says which part is largest, and the nearest plan that fits.
    """
    if job.needs is None or job.needs.fullest.total <= device.memory_gib:
        return
    trained = recipe if isinstance(recipe, TeacherRecipe) else teacher_recipe
    if isinstance(recipe, FamilyRecipe) and job.name == FAMILY_PHASE:
        shape = teacher_shape(recipe, teacher_recipe, has_files=False)
        fix = _nearest_fit(recipe, shape, job.plan.num_ranks, device)
    else:
        assert trained is not None, "a stage without a teacher recipe"
        fix = _nearest_stage_fit(trained, job, device)
    told = f"{job.name}: rank {job.needs.fullest_rank} needs {job.needs.fullest.describe()}"
    raise PlanError(f"{told}; {device.name} has {device.memory_gib:.0f} GiB", fix=fix)


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
                    found = stage_needs(changed, stage, plan).fullest.total
                    if found <= device.memory_gib:
                        own = recipe.engine.model_dump()
                        keys = [k for k, value in update.items() if value != own[k]]
                        words = [f"engine.{key}={str(update[key]).lower()}" for key in keys]
                        on = [f"{factor * job.plan.num_ranks} ranks"] if factor > 1 else []
                        return f"{' '.join([*words, *on])} needs {found:.0f} GiB."
    return (
        "No number of ranks tried makes room: use a smaller network or a device with more memory."
    )


def _nearest_fit(recipe: FamilyRecipe, shape: TeacherShape, num_ranks: int, device: Device) -> str:
    """The change with which a family fits: smaller micro-batches if they do, then more ranks too."""
    for factor in MORE_RANKS:
        for micro_batch in (recipe.engine.micro_batch, *SMALLER_MICRO_BATCHES):
            engine = recipe.engine.model_copy(update={"micro_batch": micro_batch})
            changed = recipe.model_copy(update={"engine": engine})
            with suppress(PlanError):
                plan = plan_family(changed, shape, factor * num_ranks, device)
                found = family_needs(changed, shape, plan).fullest.total
                if found <= device.memory_gib:
                    on = f" on {factor * num_ranks} ranks" if factor > 1 else ""
                    return f"engine.micro_batch={micro_batch}{on} needs {found:.0f} GiB."
    return "No number of ranks tried makes room: use smaller networks or a device with more memory."


def teacher_shape(
    recipe: FamilyRecipe, teacher_recipe: TeacherRecipe | None, *, has_files: bool = True
) -> TeacherShape:
    """Shapes of the family's teacher as its students will meet it, from recipes and files.

    ``has_files=False``: from ``teacher.arch`` where there are no files.

    Raises:
        CheckpointError: files are missing or do not fit.
    """
    source = recipe.teacher
    weights = Path(str(source.weights))
    if teacher_recipe is not None:
        shape = shape_of_recipe(teacher_recipe)
    elif not has_files and source.arch is not None and not weights.exists():
        spec = CATALOG[source.arch]
        shape = TeacherShape(spec, head_shapes(source.fit.heads, spec.width))
    else:
        spec, heads = shape_of(weights), None
        if source.heads_mode == "file":
            heads = head_shapes_of(heads_file(source, weights), spec.width)
        shape = TeacherShape(spec, heads)
    if source.heads_mode == "none":
        return replace(shape, heads=None)
    if source.heads_mode == "fit":
        return replace(shape, heads=head_shapes(source.fit.heads, shape.spec.width))
    return shape


def heads_file(source: TeacherSource, weights: Path) -> Path:
    """The file of the heads that the recipe names, or that lies beside the weights.

    Raises:
        CheckpointError: there is none.
    """
    if source.heads is not None:
        return Path(source.heads)
    if weights.is_file() and has_heads(weights):
        return weights  # a training file holds both
    beside = (weights if weights.is_dir() else weights.parent) / TRAINED_HEADS
    if source.weights is not None and not beside.is_file():
        raise CheckpointError(
            f"teacher.weights = {weights}: no {TRAINED_HEADS} beside them (released teachers have none)",
            fix="Write `heads: fit` to learn heads on this teacher first, `heads: none` to learn from "
            "its features, or name a file.",
        )
    return beside


def has_gpu(recipe: FamilyRecipe | TeacherRecipe) -> bool:
    """The recipe would run on a GPU of this machine."""
    return recipe.engine.device != "cpu" and torch.cuda.is_available()


def heads_story(recipe: FamilyRecipe) -> str:
    """One clause for people: what the students learn from, and why."""
    source = recipe.teacher
    if source.heads_mode == "none":
        return "students learn the teacher's features (heads: none)"
    if source.heads_mode == "fit":
        return f"DINO and iBOT heads are learned on the teacher first, {source.fit.steps} steps (heads: fit)"
    if source.weights is None:
        return "students learn through the heads that the teacher is trained with"
    return f"students learn through the heads in {heads_file(source, Path(source.weights))}"


def check_data(
    recipe: FamilyRecipe | TeacherRecipe, teacher_recipe: TeacherRecipe | None
) -> dict[str, int]:
    """Number of images of every source that the job reads, by path.

    Raises:
        DataError: a source is missing or holds no image.
    """
    recipes = [recipe] if teacher_recipe is None else [recipe, teacher_recipe]
    paths = dict.fromkeys(source.path for each in recipes for source in each.data.sources)
    return {path: _count_images(path) for path in paths}


def _count_images(path: str) -> int:
    return len(photograph_paths()) if path == BUILTIN_PHOTOGRAPHS else len(list_source(Path(path)))


def prepare(request: JobRequest, *, num_ranks: int, fresh: bool, say: Callable[[str], None]) -> Job:
    """Writes the run folder of a job that can start.

    ``fresh`` removes what an earlier run of this name left, and nothing outside its folder.

    Raises:
        RecipeError, PlanError, DataError, CheckpointError: with one clear line; an existing run is
        not touched.
    """
    recipe, teacher_recipe = load_job(request.recipe, request.overrides)
    plans = check_job(recipe, teacher_recipe, num_ranks)
    run_folder = Path(request.run_folder)
    _refuse_foreign_folder(run_folder)
    tiles = run_folder.parent / ".photographs"
    train, held_out = _indices(recipe.data, tiles, say)
    teacher_train = train
    if teacher_recipe is not None and teacher_recipe.data.sources != recipe.data.sources:
        teacher_train, _ = _indices(teacher_recipe.data, tiles, say)
    fingerprint = f"{train.fingerprint}-{teacher_train.fingerprint}"
    job = Job(request, recipe, teacher_recipe, fingerprint)
    if fresh:
        shutil.rmtree(run_folder, ignore_errors=True)
    resumed = find_latest(run_folder / CHECKPOINTS, job.hash, lambda _: None)  # the run tells
    joining_steps(job.recipe, job.networks, resumed)
    for line in describe_changes(job.networks, resumed):
        say(line)
    (run_folder / "data").mkdir(parents=True, exist_ok=True)
    for name, index in (("train", train), ("teacher", teacher_train), ("held_out", held_out)):
        if index is not None:
            index.save(run_folder / "data" / name)
    (run_folder / "failure.json").unlink(missing_ok=True)
    if resumed is None:  # what an earlier start left before its first checkpoint
        for name in ("status.json", "timing.json"):
            (run_folder / name).unlink(missing_ok=True)
    _write_recipes(job)
    write_json(run_folder / "plan.json", plans[-1].to_json())
    write_json(run_folder / "env.json", _environment())
    stored = {"request": asdict(request), "data_fingerprint": fingerprint}
    write_json(run_folder / "job.json", stored)
    return job


def _write_recipes(job: Job) -> None:
    """The recipe as given, and as resolved with the teacher's recipe beside it: together they run."""
    source = find_recipe(job.request.recipe)
    folder = job.run_folder
    own = [text for text in job.request.overrides if not text.startswith(TEACHER_PREFIX)]
    shutil.copyfile(source, folder / "recipe.yaml")
    (folder / RESOLVED).write_text(resolved_yaml(str(source), own, job.recipe))
    if job.teacher_recipe is not None and isinstance(job.recipe, FamilyRecipe):
        theirs = [
            text.removeprefix(TEACHER_PREFIX) for text in job.request.overrides if text not in own
        ]
        path = source.parent / str(job.recipe.teacher.train)
        (folder / path.name).write_text(resolved_yaml(str(path), theirs, job.teacher_recipe))


def _refuse_foreign_folder(run_folder: Path) -> None:
    """A folder that holds something else is neither written to nor removed."""
    is_empty = not run_folder.exists() or not any(run_folder.iterdir())
    if not is_empty and not (run_folder / "job.json").is_file():
        raise CheckpointError(
            f"{run_folder}: holds files but is not a run folder of distill",
            fix="Choose another --name or --out.",
        )


def _indices(
    data: DataSpec, tiles: Path, say: Callable[[str], None]
) -> tuple[ImageIndex, ImageIndex | None]:
    """Training and held-out images. The bundled photographs come with their split; other folders are split per class."""
    started = time.monotonic()
    paths = [source.path for source in data.sources]
    if BUILTIN_PHOTOGRAPHS in paths and len(paths) > 1:
        raise DataError(
            f"data.sources: {BUILTIN_PHOTOGRAPHS} brings its own held-out part and cannot be mixed",
            fix="Name it alone, or name folders only.",
        )
    if paths == [BUILTIN_PHOTOGRAPHS]:
        train_folder, held_out_folder = write_tiles(tiles)
        train = build_index([train_folder], max_bad_fraction=0.0)
        held_out: ImageIndex | None = build_index([held_out_folder], max_bad_fraction=0.0)
    else:
        index = _index(data)
        train, held_out = (index, None) if index.labels is None else split(index, data.held_out)
    say(
        f"images: {len(train):,} to train on, {0 if held_out is None else len(held_out):,} held out "
        f"({time.monotonic() - started:.1f} s)"
    )
    return train, held_out


def training_index(data: DataSpec, tiles: Path) -> ImageIndex:
    """The images that a recipe trains on; ``tiles`` is where bundled photographs are cut to."""
    return _indices(data, tiles, lambda _: None)[0]


def _index(data: DataSpec) -> ImageIndex:
    """The recipe's sources; from ``data.index`` where that was made for them.

    Raises:
        DataError: ``data.index`` is of other sources.
    """
    paths = [Path(source.path).absolute() for source in data.sources]
    kept = None if data.index is None else Path(data.index)
    if kept is not None and kept.exists():
        index = ImageIndex.load(kept)
        if [name for name, _ in index.sources] != [str(path) for path in paths]:
            held = ", ".join(name for name, _ in index.sources)
            raise DataError(
                f"data.index = {kept}: is of other sources ({held})",
                fix="Name another folder, or remove this one so that it is made again.",
            )
        return index
    index = build_index(
        paths, max_bad_fraction=data.max_bad_fraction, max_megapixels=data.max_megapixels
    )
    if kept is not None:
        index.save(kept)
    return index


def _environment() -> dict[str, Any]:
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": {each.metadata["Name"]: each.version for each in distributions()},
    }
