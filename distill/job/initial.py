"""What a job's networks start from: compared with the recipe before anything starts, and hashed once.

The resolved recipe holds the checksum of each ``init``. So it is in the recipe's hash wherever the files lie,
and a run goes on from its checkpoint when they are gone.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from distill.errors import CheckpointError, RecipeError, UserError
from distill.export.licences import CONTRADICTION
from distill.job.origin import licences_of_init
from distill.job.resume import Found as ResumedFrom
from distill.job.stored_recipes import Recipes, read_recipes
from distill.plan.from_recipe import ONLINE, heads_of_student, shape_of_recipe
from distill.plan.teacher_source import teacher_shape
from distill.recipe.init_keys import InitSpec
from distill.recipe.keys import FamilyRecipe, TeacherRecipe, with_inputs
from distill.recipe.networks import StudentSpec
from distill.runfolder.manifest import checkpoints
from distill.runfolder.status import write_json
from distill.weights.initial import (
    Shapes,
    Taken,
    check_initial,
    find_initial,
    head_parts,
    init_key,
    projector_parts,
)
from distill.weights.stated_inputs import inputs_of_init
from distill.weights.teacher_files import Checksums, teacher_facts
from students.shapes import BackboneSpec

INITIAL = "init.json"  # in a run folder: what each network started from


@dataclass(frozen=True)
class Beginning:
    """What one network starts from, as the recipe has it, and what was found."""

    name: str
    init: InitSpec
    taken: Taken
    inputs: str = ""

    def describe(self) -> str:
        """In one line."""
        sha = f" (sha256 {self.init.fingerprint[:16]})" if self.init.fingerprint else ""
        change = ", adapted where sizes differ" if self.init.adapt else ""
        return f"{self.name}: starts from {self.init.from_}{sha}: {self.taken.describe()}{change}{self.inputs}"


def inits_of(recipes: Recipes) -> dict[str, InitSpec]:
    """Every ``init`` of a job by the name of its network."""
    recipe, teacher_recipe = recipes
    trained = teacher_recipe if isinstance(recipe, FamilyRecipe) else recipe
    found = {} if trained is None else {ONLINE: trained.model.init}
    if isinstance(recipe, FamilyRecipe):
        found |= {student.label: student.init for student in recipe.students}
    return {name: init for name, init in found.items() if init is not None}


def check_inits(recipes: Recipes, gone: Collection[str] = ()) -> list[Beginning]:
    """Compares every ``init`` with its network, from headers alone; not those of ``gone``, whose checkpoint counts.

    Raises:
        RecipeError: it would never train the backbone.
        CheckpointError: one is missing, of another network, or under licences that contradict each other.
    """
    starts = []
    for name, init in inits_of(recipes).items():
        if name in gone:
            continue
        if init.freeze_backbone >= (steps := _num_steps(recipes, name)):
            raise RecipeError(
                f"{init_key(name)}.freeze_backbone = {init.freeze_backbone}: it has {steps} steps, so its backbone would never be trained",
                fix="Give fewer.",
            )
        spec, parts = _network(recipes, name)
        taken, licences = check_initial(init_key(name), init, spec, parts), licences_of_init(init)
        contradiction = [each for each in licences.problems if CONTRADICTION in each]
        if contradiction:
            raise CheckpointError(
                f"{init_key(name)}: licence of {contradiction[0]}",
                fix="Find out which holds, and correct the others in that folder.",
            )
        inputs = recipes[0].data.describe_inputs(inputs_of_init(init))
        starts.append(Beginning(name, init, taken, inputs))
    return starts


def describe_starts(starts: list[Beginning], found: ResumedFrom | None) -> list[str]:
    """A line for each network whose weights are not in the checkpoint that the run goes on from."""
    restored = () if found is None else (ONLINE, *found[1].networks)
    return [each.describe() for each in starts if each.name not in restored]


def _num_steps(recipes: Recipes, name: str) -> int:
    """Steps of a network."""
    recipe, teacher_recipe = recipes
    trained = recipe if isinstance(recipe, TeacherRecipe) else teacher_recipe
    if name == ONLINE:
        return sum(stage.steps for stage in trained.stages) if trained else 0
    assert isinstance(recipe, FamilyRecipe), "students are a family's"
    return next(e.steps for e in recipe.students if e.label == name) or recipe.schedule.steps


def _network(recipes: Recipes, name: str) -> tuple[BackboneSpec, Shapes]:
    """The shape of a network, and of its heads or projectors."""
    recipe, teacher_recipe = recipes
    if not isinstance(recipe, FamilyRecipe) or name == ONLINE:
        trained = teacher_recipe if isinstance(recipe, FamilyRecipe) else recipe
        assert trained is not None, "it has an init"
        shape = shape_of_recipe(trained)
        assert shape.heads is not None, "a pretrained teacher has heads"
        return shape.spec, head_parts(shape.heads)
    student: StudentSpec = next(each for each in recipe.students if each.label == name)
    spec, shape = student.backbone_spec(), teacher_shape(recipe, teacher_recipe)
    if shape.heads is not None:
        return spec, head_parts(heads_of_student(student, spec, shape.heads))
    return spec, projector_parts(spec.width, shape.spec.width)


def with_fingerprints(
    recipes: Recipes, run_folder: Path | None, checksums: Checksums
) -> tuple[Recipes, frozenset[str]]:
    """Returns the recipes with the checksum of every ``init`` and the mean and std of its source, and the names of those whose files are gone since a checkpoint; adds what was hashed to ``checksums``. ``run_folder`` is None for a fresh start.

    Raises:
        CheckpointError: files are not there, or not those that the recipe gives the checksum of.
    """
    found, gone, old = dict[str, InitSpec](), set[str](), _stored_recipes(run_folder)
    before = {} if old is None else inits_of(old)
    for name, init in inits_of(recipes).items():
        key, stored = init_key(name), before.get(name)
        try:
            files = find_initial(key, init)
        except CheckpointError:
            if stored is None or (stored.from_, stored.heads) != (init.from_, init.heads):
                raise
            gone.add(name)
            found[name] = init.model_copy(update={"fingerprint": stored.fingerprint})
            continue
        facts = teacher_facts(files.weights, files.parts, checksums)
        fingerprint = "+".join(filter(None, (facts.weights_sha256, facts.heads_sha256)))
        if init.fingerprint not in (None, fingerprint):
            raise CheckpointError(
                f"{key}.fingerprint = {init.fingerprint}: {init.from_} has {fingerprint}",
                fix="Give the files that the recipe means, or correct the key.",
            )
        found[name] = init.model_copy(update={"fingerprint": fingerprint})
    return with_inputs(_with_inits(recipes, found), inputs_of_init, old), frozenset(gone)


def _stored_recipes(run_folder: Path | None) -> Recipes | None:
    """Those of a run that has a checkpoint; None where it has not, or they cannot be read."""
    if run_folder is None or not checkpoints(run_folder / "checkpoints"):
        return None
    try:
        return read_recipes(run_folder)
    except UserError:
        return None


def _with_inits(recipes: Recipes, inits: dict[str, InitSpec]) -> Recipes:
    recipe, teacher_recipe = recipes
    if not inits:
        return recipes
    if isinstance(recipe, FamilyRecipe):
        students = tuple(
            student.model_copy(update={"init": inits.get(student.label)})
            for student in recipe.students
        )
        recipe = recipe.model_copy(update={"students": students})
    elif ONLINE in inits:
        model = recipe.model.model_copy(update={"init": inits[ONLINE]})
        recipe = recipe.model_copy(update={"model": model})
    if teacher_recipe is not None and ONLINE in inits:
        model = teacher_recipe.model.model_copy(update={"init": inits[ONLINE]})
        teacher_recipe = teacher_recipe.model_copy(update={"model": model})
    return recipe, teacher_recipe


def note_inits(run_folder: Path, starts: list[Beginning]) -> None:
    """Writes what each network started from to ``init.json``; nothing where none did."""
    if starts:
        facts = {
            each.name: {
                "from": each.init.from_,
                "fingerprint": each.init.fingerprint,
                "taken": ["backbone", *each.taken.parts],
                "fresh": dict(each.taken.fresh),
            }
            for each in starts
        }
        write_json(run_folder / INITIAL, facts)
