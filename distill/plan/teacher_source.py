"""The teacher of a recipe: its shape, and where its heads are."""

from dataclasses import replace
from pathlib import Path

from distill.errors import CheckpointError
from distill.plan.from_recipe import TeacherShape, head_shapes, shape_of_recipe
from distill.recipe.inputs import are_same
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.networks import TeacherSource
from distill.runfolder.status import TRAINED_HEADS
from students.shapes import CATALOG

IMAGE_CHANNELS = 3


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
        from distill.weights.heads import head_shapes_of  # who only plans reads no file
        from distill.weights.load import stated_shape

        spec, heads = stated_shape(weights), None
        if spec.in_channels != IMAGE_CHANNELS:
            raise CheckpointError(
                f"teacher.weights = {weights}: takes images of {spec.in_channels} channels, ours have 3",
                fix="Use a teacher for RGB images.",
            )
        if source.heads_mode == "file":
            heads = head_shapes_of(heads_file(source, weights), spec.width)
        shape = TeacherShape(spec, heads)
    if source.heads_mode == "none":
        return replace(shape, heads=None)
    if source.heads_mode == "fit":
        return replace(shape, heads=head_shapes(source.fit.heads, shape.spec.width))
    return shape


def with_teacher_stats(recipe: FamilyRecipe | TeacherRecipe) -> FamilyRecipe | TeacherRecipe:
    """The recipe with the mean and std that its given teacher's files state, where it gives none.

    Raises:
        CheckpointError: it gives others; students would learn from features of other pixels than the teacher's.
    """
    if not isinstance(recipe, FamilyRecipe) or recipe.teacher.weights is None:
        return recipe
    weights = Path(recipe.teacher.weights)
    if not weights.exists():
        return recipe

    from distill.weights.stated_inputs import stated_inputs  # who only plans reads no file

    stated, update = stated_inputs(weights), dict[str, tuple[float, ...]]()
    for key, theirs in (("mean", stated.mean), ("std", stated.std)):
        ours: tuple[float, ...] = getattr(recipe.data, key)
        if theirs is None or are_same(ours, theirs):
            continue
        if key in recipe.data.model_fields_set:
            raise CheckpointError(
                f"data.{key} = {list(ours)}: the teacher's {stated.source} has {list(theirs)}",
                fix="Remove data.mean and data.std from the recipe, and the teacher's are taken.",
            )
        update[key] = theirs
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=update)})


def describe_teacher(recipe: FamilyRecipe | TeacherRecipe) -> list[str]:
    """Lines for people about a teacher that is given: which backbone of its file, and how images are normalised.

    Raises:
        CheckpointError: files are damaged or do not fit.
    """
    if not isinstance(recipe, FamilyRecipe) or recipe.teacher.weights is None:
        return []
    weights = Path(recipe.teacher.weights)

    from distill.weights.containers import open_weights  # who only plans reads no file
    from distill.weights.load import identify_layout
    from distill.weights.stated_inputs import stated_inputs

    lines = [f"teacher: {note}" for note in identify_layout(open_weights(weights)).notes]
    data, stated = recipe.data, stated_inputs(weights)
    usual = tuple(type(data).model_fields[key].default for key in ("mean", "std"))
    if stated.mean is not None and (data.mean, data.std) != usual:
        lines.append(
            f"images: normalised with the teacher's mean {list(data.mean)} and std {list(data.std)} ({stated.source})"
        )
    return lines


def heads_file(source: TeacherSource, weights: Path) -> Path:
    """The file of the heads that the recipe names, or that lies beside the weights.

    Raises:
        CheckpointError: there is none.
    """
    if source.heads is not None:
        return Path(source.heads)

    from distill.weights.heads import heads_beside  # who only plans reads no file

    beside = heads_beside(weights)
    if source.weights is not None and not beside.is_file():
        raise CheckpointError(
            f"teacher.weights = {weights}: no {TRAINED_HEADS} beside them (released teachers have none)",
            fix="Write `heads: fit` to learn heads on this teacher first, `heads: none` to learn from "
            "its features, or name a file.",
        )
    return beside


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
