"""Everything that happens once, before any process starts: recipe read, images indexed, run folder written.

What can be wrong with a recipe, a folder of images or a world size is found here, in one process,
with one clear line each.
"""

import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from distill.data.build_index import build_index, list_images, source_name
from distill.data.index import ImageIndex
from distill.data.photographs import photograph_paths, write_tiles
from distill.data.split import split, why_nothing_is_held_out
from distill.engine.held_copies import remove_copies
from distill.errors import CheckpointError, DataError
from distill.job.changes import with_changes
from distill.job.initial import check_inits, describe_starts, note_inits, with_fingerprints
from distill.job.origin import licences_of_students, licences_of_teacher, store_licences
from distill.job.resume import describe_resume, find_saved, joining_steps
from distill.job.stored_recipes import load_from_here, read_recipes, write_recipes
from distill.listing.extensions import BUILTIN, ExtensionKind, find
from distill.listing.labels import label_lines
from distill.listing.passed_over import PassedOver
from distill.listing.source_paths import source_path
from distill.listing.sources import Lister
from distill.plan.copies import lacking_memory
from distill.plan.from_recipe import on_nodes_of
from distill.plan.here import device_here, timed_on, why_not_compiled
from distill.plan.job import check_job, main_plan
from distill.plan.teacher_source import describe_teacher, heads_file
from distill.recipe.inputs import DataSpec, SourceSpec
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.recipe_hash import recipe_hash
from distill.recipe.types import BUILTIN_PHOTOGRAPHS
from distill.runfolder.files import make_folder, remove
from distill.runfolder.manifest import ChangedError, TeacherFacts
from distill.runfolder.status import TRAINED_HEADS, write_json
from distill.weights.teacher_files import (
    CHECKSUMS,
    Checksums,
    read_checksums,
    refuse_another_teacher,
    teacher_facts,
)

CHECKPOINTS = "checkpoints"  # in a run folder
IMAGES = "images.json"  # in data/ of a run folder: counts, and what was passed over
BEFORE_CHECKPOINT = ("status.json", "timing.json")  # what an earlier start left before its first
FITTED_HEADS = "heads/teacher.safetensors"  # in a run folder


@dataclass(frozen=True)
class JobRequest:
    """What the user requested. ``prepare`` reads the recipe by it; from then on the run folder's is read."""

    recipe: str
    overrides: tuple[str, ...]
    run_folder: str
    resume_command: str
    until: str | None = None  # the phase to end after; None for the full job
    ranks_per_node: int | None = None  # as the launcher started them; None where the recipe has it
    launch: str = ""  # the nonce of a launch whose ranks were started by others


@dataclass(frozen=True)
class Job:
    """A prepared run: recipes, hash, and where the teacher is or will be."""

    request: JobRequest
    recipe: FamilyRecipe | TeacherRecipe
    teacher_recipe: TeacherRecipe | None
    data_fingerprint: str
    teacher: TeacherFacts | None = None  # None where the run trains its teacher

    @property
    def run_folder(self) -> Path:
        return Path(self.request.run_folder)

    @property
    def resume_command(self) -> str:
        return self.request.resume_command

    @property
    def hash(self) -> str:
        """Identifies everything that decides a network's result except its entry in the recipe: both recipes and the images."""
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
        """Every student, and a hash of its recipe entry."""
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
    """The job that ``prepare`` wrote, from its run folder alone; every rank, restart and score reads it."""
    stored = json.loads((run_folder / "job.json").read_text())
    here = {"overrides": tuple(stored["request"]["overrides"]), "run_folder": str(run_folder)}
    request = JobRequest(**{**stored["request"], **here})
    recipe, teacher_recipe = read_recipes(run_folder)
    recipe = on_nodes_of(recipe, request.ranks_per_node)
    teacher = stored.get("teacher")  # absent in runs of 0.1.0
    facts = None if teacher is None else TeacherFacts(**teacher)
    return Job(request, recipe, teacher_recipe, stored["data_fingerprint"], facts)


def launch_of(run_folder: Path) -> str:
    """The nonce of the launch that prepared a run folder; empty where there is none to be read."""
    try:
        return str(json.loads((run_folder / "job.json").read_text())["request"].get("launch", ""))
    except (OSError, ValueError, KeyError):
        return ""


def check_data(
    recipe: FamilyRecipe | TeacherRecipe,
    teacher_recipe: TeacherRecipe | None,
    *,
    runs_code: bool = True,
    passed_over: dict[str, PassedOver] | None = None,
) -> dict[str, int]:
    """Number of images of every source that the job reads, by path.

    Without ``runs_code`` sources that a lister of an installed package lists are left out.
    ``passed_over`` gets what each holds besides, with a line for labels that are missing.

    Raises:
        DataError: a source is missing or holds no image.
    """
    recipes = [recipe] if teacher_recipe is None else [recipe, teacher_recipe]
    sources = {source.path: source for each in recipes for source in each.data.sources}
    builtin = (None, *BUILTIN[ExtensionKind.SOURCE])
    details = {} if passed_over is None else passed_over
    return {
        path: _count_images(source, details.setdefault(path, PassedOver()))
        for path, source in sources.items()
        if runs_code or source.lister in builtin
    }


def _count_images(source: SourceSpec, passed_over: PassedOver) -> int:
    if source.path == BUILTIN_PHOTOGRAPHS:
        return len(photograph_paths())
    found = list_images(
        Path(source.path),
        _lister_of(source),
        passed_over=passed_over,
        label_depth=source.label_depth,
    )
    passed_over.remarks.extend(label_lines(Counter(each.label for each in found)))
    return len(found)


def _lister_of(source: SourceSpec) -> Lister | None:
    """What the recipe names to list a source; None leaves it to the suffixes."""
    if source.lister is None:
        return None
    found: Lister = find(ExtensionKind.SOURCE, source.lister, "data.sources.lister")
    return found


def prepare(request: JobRequest, *, num_ranks: int, fresh: bool, say: Callable[[str], None]) -> Job:
    """Writes the run folder of a job that can start.

    ``fresh`` removes what an earlier run of this name left, and nothing outside its folder.

    Raises:
        RecipeError, PlanError, DataError, CheckpointError: with one clear line; an existing run is
        not touched.
    """
    run_folder, checksums = Path(request.run_folder), read_checksums(Path(request.run_folder))
    recipes = load_from_here(request.recipe, request.overrides, check_folders=True)
    recipes, gone = with_fingerprints(recipes, None if fresh else run_folder, checksums)
    recipe, teacher_recipe = recipes
    plans = check_job(on_nodes_of(recipe, request.ranks_per_node), teacher_recipe, num_ranks)
    eager, starts = why_not_compiled(recipes), check_inits(recipes, gone)
    _refuse_foreign_folder(run_folder)
    tiles = run_folder.parent / ".photographs"
    train, held_out, facts = _indices(recipe.data, tiles, say)
    teacher_train = train
    if teacher_recipe is not None and teacher_recipe.data.sources != recipe.data.sources:
        teacher_train, _, facts["teacher"] = _indices(teacher_recipe.data, tiles, say)
    fingerprint = f"{train.fingerprint}-{teacher_train.fingerprint}"
    job = Job(request, recipe, teacher_recipe, fingerprint)
    licences = None if gone else licences_of_teacher(recipe, teacher_recipe)
    if fresh and run_folder.exists():
        _empty(run_folder)
    try:
        resumed = find_saved(run_folder / CHECKPOINTS, job.hash, has_copies=recipe.checkpoint.peer)
        joining_steps(job.recipe, job.networks, resumed)
    except ChangedError as error:
        changed = {"train": train, "held_out": held_out}
        changed |= {} if teacher_train is train else {"teacher": teacher_train}
        raise with_changes(error, run_folder, recipes, changed) from error
    job = replace(job, teacher=_teacher_facts(job, checksums))
    refuse_another_teacher(job.teacher, resumed)
    lacking = lacking_memory(recipe, plans, num_ranks, request.ranks_per_node)
    resumes = [*describe_resume(job.networks, resumed), *describe_starts(starts, resumed)]
    _say_all(say, (*describe_teacher(recipe), *resumes, *lacking, *eager))
    stored: dict[str, Any] = {"request": asdict(request), "data_fingerprint": fingerprint}
    make_folder(run_folder.resolve())  # a link may lead to a folder that is not there yet
    marker = run_folder / "job.json"
    if not marker.exists():  # first: a start that is killed from here on leaves a folder of ours
        write_json(marker, {**stored, "request": asdict(replace(request, launch=""))})
    parts = {"train": train, "teacher": teacher_train, "held_out": held_out}
    _write_images(run_folder.resolve() / "data", parts, facts)
    is_first = resumed is None and not recipe.checkpoint.peer
    for name in ("failure.json", *(BEFORE_CHECKPOINT if is_first else ())):
        (run_folder / name).unlink(missing_ok=True)
    write_recipes(run_folder, request.recipe, request.overrides, recipes)
    device = device_here(recipe.engine.device, request.ranks_per_node or num_ranks)
    write_json(run_folder / "plan.json", timed_on(main_plan(plans).to_json(), device))
    write_json(run_folder / "env.json", _environment())
    write_json(run_folder / CHECKSUMS, checksums)
    if licences is not None:  # what stands there holds for files that are gone
        store_licences(run_folder, licences, licences_of_students(recipe, licences))
    note_inits(run_folder, starts)
    if job.teacher is not None:
        stored["teacher"] = job.teacher.model_dump()
    write_json(marker, stored)
    return job


def _say_all(say: Callable[[str], None], lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def _write_images(
    folder: Path, indices: Mapping[str, ImageIndex | None], facts: Mapping[str, Any]
) -> None:
    """The indices of the run, and what its sources hold besides; an index of a start with other images goes."""
    make_folder(folder)
    for name, index in indices.items():
        if index is not None:
            index.save(folder / name)
        elif (folder / name).exists():
            remove(folder / name)
    write_json(folder / IMAGES, facts)


def _teacher_facts(job: Job, checksums: Checksums) -> TeacherFacts | None:
    """The files of a teacher that is given; None where the run trains it."""
    if not isinstance(job.recipe, FamilyRecipe) or job.recipe.teacher.weights is None:
        return None
    weights, heads = job.teacher_paths
    return teacher_facts(
        weights, heads if job.recipe.teacher.heads_mode == "file" else None, checksums
    )


def _refuse_foreign_folder(run_folder: Path) -> None:
    """A folder that holds something else is neither written to nor removed."""
    entries = run_folder.iterdir() if run_folder.exists() else ()
    is_empty = all(entry.match(".job.json.*.part") for entry in entries)  # a kill may leave that
    if not is_empty and not (run_folder / "job.json").is_file():
        raise CheckpointError(
            f"{run_folder}: holds files but is not a run folder of distill",
            fix="Choose another --name or --out.",
        )


def _empty(run_folder: Path) -> None:
    """Removes what a run folder holds, and its copies in memory: checkpoints first, ``job.json``, which marks it as ours, last. The folder stays, which may be a link.

    Raises:
        CheckpointError: something cannot be removed; what comes after it is still there.
    """
    remove_copies(run_folder)
    last, first = "job.json", CHECKPOINTS
    for entry in sorted(run_folder.iterdir(), key=lambda e: (e.name == last, e.name != first)):
        try:
            remove(entry)
        except OSError as error:
            raise CheckpointError(
                f"{entry}: --fresh could not remove it ({error}); nothing was started",
                fix=f"Remove {run_folder} by hand, or give another --name.",
            ) from error


def _indices(
    data: DataSpec, tiles: Path, say: Callable[[str], None]
) -> tuple[ImageIndex, ImageIndex | None, dict[str, Any]]:
    """Training and held-out images, and facts about them. The bundled photographs come with their split; other sources are split by ``split``."""
    started = time.monotonic()
    paths = [source.path for source in data.sources]
    if BUILTIN_PHOTOGRAPHS in paths and len(paths) > 1:
        raise DataError(
            f"data.sources: {BUILTIN_PHOTOGRAPHS} has a held-out part already and cannot be mixed",
            fix="Name it alone, or name folders only.",
        )
    if paths == [BUILTIN_PHOTOGRAPHS]:
        train_folder, held_out_folder = write_tiles(tiles)
        index = train = build_index([train_folder], max_bad_fraction=0.0)
        held_out: ImageIndex | None = build_index([held_out_folder], max_bad_fraction=0.0)
    else:
        index = _index(data)
        train, held_out = split(index, data.held_out)
    passed = index.passed_over
    passed.remarks.extend(label_lines(index.label_counts))
    count = 0 if held_out is None else len(held_out)
    over = f", passed over: {passed.describe()}" if passed.reasons else ""
    took_s = time.monotonic() - started
    say(f"images: {len(train):,} to train on, {count:,} held out{over} ({took_s:.1f} s)")
    for line in passed.lines():
        say(f"images: {line}")
    facts = {"train": len(train), "held_out": count, "without_label": index.label_counts[""]}
    reason = "" if count else why_nothing_is_held_out(index, data.held_out)
    return train, held_out, {**facts, "no_held_out": reason, **passed.to_json()}


def training_index(data: DataSpec, tiles: Path) -> ImageIndex:
    """The images that a recipe trains on; ``tiles`` is where bundled photographs are cut to."""
    return _indices(data, tiles, lambda _: None)[0]


def _index(data: DataSpec) -> ImageIndex:
    """The recipe's sources; from ``data.index`` where that was made for them.

    Raises:
        DataError: ``data.index`` is of other sources.
    """
    paths = [source_path(source.path) for source in data.sources]
    depths = {
        path: source.label_depth
        for path, source in zip(paths, data.sources, strict=True)
        if source.label_depth is not None
    }
    index_folder = None if data.index is None else Path(data.index)
    if index_folder is not None and index_folder.exists():
        index = ImageIndex.load(index_folder)
        if [name for name, _ in index.sources] != [source_name(p, depths.get(p)) for p in paths]:
            held = ", ".join(name for name, _ in index.sources)
            raise DataError(
                f"data.index = {index_folder}: is of other sources ({held})",
                fix="Name another folder, or remove this one so that it is made again.",
            )
        if index.decoders is not None:
            return index
        # of version 0.1.0: made again, since some of its sizes are not those that Pillow shows
    listers = {path: _lister_of(source) for path, source in zip(paths, data.sources, strict=True)}
    index = build_index(
        paths,
        max_bad_fraction=data.max_bad_fraction,
        max_megapixels=data.max_megapixels,
        listers={path: lister for path, lister in listers.items() if lister is not None},
        label_depths=depths,
    )
    if index_folder is not None:
        index.save(index_folder)
    return index


def _environment() -> dict[str, Any]:
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": {each.metadata["Name"]: each.version for each in distributions()},
    }
