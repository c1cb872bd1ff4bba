"""Where a run's networks come from: what ``distill.json``, the card and the licence files of each are written from.

``RUN/licences`` holds the licences of the teacher as they were when the run was prepared, so that its students
have them wherever the teacher's folder is by then.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.data.index import ImageIndex
from distill.errors import CheckpointError
from distill.export.card import (
    DISTILLATION,
    KEEP_MARK,
    PRETRAINING,
    Background,
    folder_form,
    model_card,
    read_inputs,
)
from distill.export.licence_chain import together
from distill.export.licences import (
    CARD,
    CONTRADICTION,
    RECORD,
    Licences,
    Stated,
    Terms,
    folder_of,
    licences_in,
    licences_of,
    record_in,
    write_licences,
)
from distill.export.network_names import HUB_NAME, base_model, teacher_name
from distill.job.stored_recipes import Recipes
from distill.recipe.init_keys import InitSpec, LicenceSpec
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.recipe_hash import recipe_hash
from distill.runfolder.files import is_full, make_folder, remove, replace_text
from distill.runfolder.status import TEACHER, write_json
from distill.weights.identity import catalogue_name
from distill.weights.initial import BESIDE, NO_HEADS, find_initial
from distill.weights.load import shape_of
from distill.weights.stated_inputs import PREPARATION
from students.shapes import BackboneSpec

if TYPE_CHECKING:
    from distill.job.prepare import Job

LICENCES = "licences"  # in a run folder


def licences_of_teacher(
    recipe: FamilyRecipe | TeacherRecipe, teacher_recipe: TeacherRecipe | None
) -> Licences:
    """The licences under which what a job trains may be passed on: of the teacher that is given, and of those before it.

    Raises:
        CheckpointError: a licence file cannot be read.
    """
    if isinstance(recipe, TeacherRecipe):
        init = recipe.model.init
        pretrained = Licences((Terms(recipe.name, is_pretrained=True),))
        return pretrained if init is None else licences_of_init(init)
    source, stated = recipe.teacher, _stated(recipe.teacher.licence)
    if teacher_recipe is not None and teacher_recipe.model.init is not None:
        of_init = licences_of_init(teacher_recipe.model.init)
        named = licences_of(None, teacher_recipe.name, stated)
        return of_init if stated == Stated() else together(named, of_init)
    if source.weights is None:
        name = "the teacher" if teacher_recipe is None else teacher_recipe.name
        return licences_of(None, name, stated)
    weights = Path(source.weights)
    heads = Path(str(source.heads)).parent if source.heads_mode == "file" and source.heads else None
    return licences_of(weights, teacher_name(weights), stated, heads)


def _stated(spec: LicenceSpec | None) -> Stated:
    """What the recipe states of a licence."""
    if spec is None:
        return Stated()
    file = None if spec.file is None else Path(spec.file).expanduser()
    return Stated(spec.name or "", spec.link or "", file)


def licences_of_init(init: InitSpec) -> Licences:
    """The licences of what a network starts from, and of those before it.

    Raises:
        CheckpointError: there are no such weights, or a licence file cannot be read.
    """
    weights = find_initial("init", init).weights
    heads = Path(init.heads).parent if init.heads not in (None, NO_HEADS, BESIDE) else None
    return licences_of(weights, teacher_name(weights), _stated(init.licence), heads)


def licences_of_students(
    recipe: FamilyRecipe | TeacherRecipe, of_teacher: Licences
) -> dict[str, Licences]:
    """The licences of each student that starts from weights: the teacher's and theirs.

    Raises:
        CheckpointError: as ``licences_of_init``.
    """
    students = recipe.students if isinstance(recipe, FamilyRecipe) else ()
    return {
        student.label: together(of_teacher, licences_of_init(student.init))
        for student in students
        if student.init is not None
    }


def init_record(init: InitSpec | None) -> dict[str, Any]:
    """What ``distill.json`` records of what a network started from; nothing where it started fresh."""
    if init is None:
        return {}
    try:
        name = teacher_name(find_initial("init", init).weights)
    except CheckpointError:  # gone since
        name = Path(init.from_).name
    return {"init": {"name": name, "sha256": init.fingerprint or "unknown"}}


def licence_warning(
    recipe: FamilyRecipe | TeacherRecipe, teacher_recipe: TeacherRecipe | None
) -> str | None:
    """One line for people where a licence is unknown or statements of it contradict each other; None where all is known.

    Raises:
        CheckpointError: a licence file cannot be read.
    """
    trained = recipe if isinstance(recipe, TeacherRecipe) else teacher_recipe
    key = "model.init" if trained is not None and trained.model.init is not None else "teacher"
    found = {key: licences_of_teacher(recipe, teacher_recipe)}
    for student in recipe.students if isinstance(recipe, FamilyRecipe) else ():
        if student.init is not None:
            found[f"students.{student.label}.init"] = licences_of_init(student.init)
    lines = []
    for key, licences in found.items():
        problems = licences.problems
        fix = f"state it in {key}.licence (name, file, link)"
        if any(CONTRADICTION in problem for problem in problems):
            fix = "find out which holds and correct the others"
        whose = (
            "the teacher unknown, and so in every card" if key == "teacher" else f"{key} unknown"
        )
        if problems:
            lines.append(f"licence of {whose}: {'; '.join(problems)}; {fix}")
    return "; ".join(lines) or None


def store_licences(
    run_folder: Path, licences: Licences, of_students: Mapping[str, Licences] | None = None
) -> None:
    """Writes ``RUN/licences``: the files, then their list; a folder inside for each student that has further ones."""
    folder, further = run_folder.resolve() / LICENCES, of_students or {}
    for old in folder.glob("*/"):
        if old.name not in further:
            remove(old)
    for path, each in ((folder, licences), *((folder / name, of) for name, of in further.items())):
        make_folder(path)
        write_licences(path, each)
        write_json(path / RECORD, {"licences": each.to_json()})


def licences_of_network(run_folder: Path, name: str) -> Licences:
    """What ``store_licences`` wrote for one of the run's networks."""
    folder = run_folder / LICENCES
    return licences_in(folder / name if (folder / name).is_dir() else folder)


def stored_licences(
    run_folder: Path, recipe: FamilyRecipe | TeacherRecipe, teacher_recipe: TeacherRecipe | None
) -> Licences:
    """Reads ``RUN/licences``; what the teacher's folder states now for a run of 0.1.0, which has none."""
    if (run_folder / LICENCES / RECORD).is_file():
        return licences_in(run_folder / LICENCES)
    if isinstance(recipe, FamilyRecipe) and not Path(recipe.teacher.weights or ".").exists():
        name = Path(str(recipe.teacher.weights)).name
        return Licences((Terms(name, problem="its folder is gone"),))
    return licences_of_teacher(recipe, teacher_recipe)


def _licences_now(
    run_folder: Path, recipe: FamilyRecipe | TeacherRecipe, teacher_recipe: TeacherRecipe | None
) -> Licences:
    """What the teacher's folder states now, for somebody who found the licence out after training."""
    if isinstance(recipe, FamilyRecipe) and recipe.teacher.weights is not None:
        path = Path(recipe.teacher.weights)
        return licences_of_teacher(recipe, teacher_recipe) if path.exists() else Licences()
    path = run_folder / TEACHER
    return licences_of(path, teacher_name(path)) if path.is_dir() else Licences()


def student_record(
    job: "Job", spec: BackboneSpec, fingerprint: str, num_images: int, steps: int
) -> dict[str, Any]:
    """``distill.json`` of a student: recipe, data, and the teacher whose backbone is ``spec``."""
    recipe = job.recipe
    assert isinstance(recipe, FamilyRecipe), "students are a family's"
    weights, _ = job.teacher_paths
    teacher: dict[str, Any] = {"name": teacher_name(weights)}
    teacher |= {"arch": catalogue_name(spec) or type(spec).__name__.removesuffix("Spec").lower()}
    teacher |= {"parameters": spec.exported.parameters}
    sha256 = "" if job.teacher is None else job.teacher.weights_sha256
    if sha256:
        teacher["sha256"] = sha256
    record = record_in(folder_of(weights))
    if record.get("teacher"):
        teacher["teacher"] = record["teacher"]
    base = base_model(weights, sha256) or record.get("base_model")
    found = {"method": DISTILLATION, **_facts(recipe, job.data_fingerprint, num_images, steps)}
    found |= {"teacher": teacher, "teacher_fingerprint": fingerprint}
    return {**found, **({"base_model": base} if base else {})}


def pretrained_record(
    job: "Job", recipe: TeacherRecipe, num_images: int, steps: int
) -> dict[str, Any]:
    """``distill.json`` of a teacher that the run trained."""
    found = {"method": PRETRAINING, **_facts(recipe, job.data_fingerprint, num_images, steps)}
    found |= init_record(recipe.model.init)
    name = found.get("init", {}).get("name", "")
    return {**found, **({"base_model": name} if HUB_NAME.fullmatch(name) else {})}


def background_of(
    run_folder: Path, name: str, folder: Path, recipes: Recipes, scores: Mapping[str, Any]
) -> Background:
    """What the card of a network of a run is written from; what a record of 0.1.0 lacks is looked up in the run.

    ``name`` is ``teacher`` for the run's teacher, whose licences are those that the run noted.

    Raises:
        CheckpointError: a licence file or a record cannot be read.
    """
    record = record_in(folder)
    licences = stored_licences(run_folder, *recipes)
    if name != TEACHER and "licences" in record:
        licences = licences_of(folder, name)
    if not licences.is_known:
        now = _licences_now(run_folder, *recipes)
        licences = now if now.is_known else licences
    if not record or "method" in record:
        return Background(record, licences, scores)
    recipe, index = recipes[0], run_folder / "data" / "train"
    facts: dict[str, Any] = {"sources": _names_of(recipe)}
    if index.is_dir():
        facts["images"] = len(ImageIndex.load(index))
    if isinstance(recipe, FamilyRecipe):
        weights = recipe.teacher.weights
        path = run_folder / "teacher" if weights is None else Path(weights)
        facts["teacher"] = {"name": teacher_name(path)}
    return Background({**facts, **record}, licences, scores)


def complete_cards(
    job: "Job", specs: Mapping[str, BackboneSpec], summary: Mapping[str, Any]
) -> list[str]:
    """Writes the cards of a run's networks again, with the scores that there are now; not those that the user took over.

    ``specs`` are those of the students that were trained.

    Returns:
        A line for people where the disk has no room; the cards of before are then there.
    """
    run_folder, recipes = job.run_folder, (job.recipe, job.teacher_recipe)
    folders = {name: (run_folder / "students" / name, spec) for name, spec in specs.items()}
    if job.pretrains is not None:
        folders[TEACHER] = (run_folder / TEACHER, shape_of(run_folder / TEACHER))
    try:
        for name, (folder, spec) in folders.items():
            background = background_of(run_folder, name, folder, recipes, summary)
            _complete_card(folder, spec, background)
    except OSError as error:
        if not is_full(error):
            raise
        return [f"model cards are without scores ({error.strerror}): make room and score again"]
    return []


def _complete_card(folder: Path, spec: BackboneSpec, background: Background) -> None:
    card = folder / CARD
    if card.is_file() and not _is_ours(card.read_text(encoding="utf-8", errors="replace")):
        return
    write_licences(folder, background.licences)
    num_bytes = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    inputs, form = read_inputs(folder / PREPARATION), folder_form(folder.name, spec, num_bytes)
    replace_text(card, model_card(folder.name, spec, inputs, background, form))


def _is_ours(text: str) -> bool:
    """Whether distill wrote a card: it has the mark, or is one of 0.1.0."""
    return KEEP_MARK in text or "trained by self-distillation; EMA weights in fp32." in text


def _facts(
    recipe: FamilyRecipe | TeacherRecipe, data: str, num_images: int, steps: int
) -> dict[str, Any]:
    """Facts of training; names of the sources only, because paths are private."""
    return {
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        "steps": steps,
        "data": data,
        "images": num_images,
        "sources": _names_of(recipe),
    }


def _names_of(recipe: FamilyRecipe | TeacherRecipe) -> list[str]:
    return [Path(source.path).name for source in recipe.data.sources]
