"""What is legal in a recipe and probably not meant: lengths, numbers of images, keys that do nothing, heads out of proportion."""

from collections.abc import Iterator, Sequence

from distill.plan.from_recipe import TeacherShape, heads_of_student
from distill.plan.memory import head_parameters
from distill.recipe.keys import FamilyRecipe, Recipe, TeacherRecipe
from distill.recipe.schedules import (
    FamilyStageSpec,
    LrSpec,
    ObjectiveSpec,
    ScheduleSpec,
    TemperatureSpec,
)

# A student's heads may have so many times the parameters of its backbone; the published ViT-S has 8 times
MOST_OF_BACKBONE = 20.0
WITH_HEADS, WITHOUT_HEADS = ("dino", "ibot", "koleo"), ("cosine", "smooth_l1")


def find_warnings(
    recipe: Recipe,
    teacher_recipe: TeacherRecipe | None,
    shape: TeacherShape | None,
    num_images: Sequence[int],
) -> list[str]:
    """Returns a line for each thing to look at, with the key to turn.

    Args:
        recipe: of the job.
        teacher_recipe: the recipe of the teacher that it trains first.
        shape: of the teacher that the students meet; None for a teacher's recipe, or if it is not known.
        num_images: training images of the recipe and, if it has one, of the teacher's; 0 is not known.
    """
    found: list[str] = []
    recipes = (recipe,) if teacher_recipe is None else (recipe, teacher_recipe)
    for each, images in zip(recipes, num_images, strict=True):
        prefix = "" if each is recipe else "teacher:"
        found += [f"{prefix}{line}" for line in _lengths(each)]
        found += [f"{prefix}{line}" for line in _numbers_of_images(each, images)]
        found += [f"{prefix}{line}" for line in _idle_keys(each)]
    if isinstance(recipe, FamilyRecipe) and shape is not None:
        found += _heads_too_large(recipe, teacher_recipe, shape)
    return found


def _lengths(recipe: Recipe) -> Iterator[str]:
    """Warm-ups that end after what they belong to."""
    schedule = recipe.schedule
    if isinstance(recipe, FamilyRecipe):
        steps = recipe.schedule.steps
        yield from _warmups("schedule", schedule, steps)
        shortest = min(student.steps or steps for student in recipe.students)
        if schedule.lr.warmup < steps and shortest <= schedule.lr.warmup:
            name = min(recipe.students, key=lambda student: student.steps or steps).label
            yield f"schedule.lr.warmup = {schedule.lr.warmup}: {name} ends at step {shortest}, within it"
        fit = recipe.teacher.fit
        if recipe.teacher.heads_mode == "fit" and fit.warmup >= fit.steps:
            yield _too_long("teacher.fit.warmup", fit.warmup, "teacher.fit.steps", fit.steps)
        yield from _stage_warmups(recipe.stages or ())
        return
    yield from _warmups("schedule", schedule, sum(stage.steps for stage in recipe.stages))
    yield from _stage_warmups(recipe.stages)
    for position, stage in enumerate(recipe.stages):
        times, rest = divmod(stage.steps, stage.gram.refresh) if stage.gram else (0, 1)
        if stage.gram and not rest and times <= stage.gram.max_refreshes:
            text = f"stages.{position}.gram.refresh = {stage.gram.refresh:,}: the refresh at the stage's last step"
            yield f"{text} ({stage.steps:,}) never acts; give the stage more steps"


def _stage_warmups(stages: Sequence[FamilyStageSpec]) -> Iterator[str]:
    for position, stage in enumerate(stages):
        if stage.lr is not None and stage.lr.warmup >= stage.steps:
            key = f"stages.{position}"
            yield _too_long(f"{key}.lr.warmup", stage.lr.warmup, f"{key}.steps", stage.steps)


def _warmups(key: str, schedule: ScheduleSpec, steps: int) -> Iterator[str]:
    parts: dict[str, LrSpec | TemperatureSpec] = {
        "lr": schedule.lr,
        "teacher_temperature": schedule.teacher_temperature,
    }
    for name, part in parts.items():
        if part.warmup >= steps:
            yield _too_long(f"{key}.{name}.warmup", part.warmup, "steps", steps)
    if schedule.freeze_prototypes >= steps:
        yield _too_long(f"{key}.freeze_prototypes", schedule.freeze_prototypes, "steps", steps)


def _too_long(key: str, value: int, of: str, steps: int) -> str:
    return f"{key} = {value:,}: not shorter than the run ({of} = {steps:,}), so its end is never reached"


def _numbers_of_images(recipe: Recipe, images: int) -> Iterator[str]:
    """A batch, and prototypes, that the images do not suffice for."""
    if not images:
        return
    batches = {"schedule.batch": recipe.schedule.batch}
    batches |= {f"stages.{i}.batch": each.batch or 0 for i, each in enumerate(recipe.stages or ())}
    for key, batch in batches.items():
        if batch > images:
            yield f"{key} = {batch:,}: more than the {images:,} images, so a step has some twice"
    heads = {"heads": recipe.heads} if isinstance(recipe, TeacherRecipe) else {}
    if isinstance(recipe, FamilyRecipe) and recipe.teacher.heads_mode == "fit":
        heads = {"teacher.fit.heads": recipe.teacher.fit.heads}
    for key, spec in heads.items():
        for name, head in (("dino", spec.dino), ("ibot", spec.ibot)):
            if head.prototypes > images:
                fewer = f"{{hidden: {head.hidden}, bottleneck: {head.bottleneck}, prototypes: {_power_below(images)}}}"
                yield (
                    f"{key}.{name}.prototypes = {head.prototypes:,}: {images / head.prototypes:.2g} images for each; "
                    f"{key}.{name}={fewer} has one for each"
                )


def _power_below(value: int) -> int:
    return max(2, int(2 ** (value.bit_length() - 1)))


def _idle_keys(recipe: Recipe) -> Iterator[str]:
    """Weights that were changed and have no loss term."""
    if isinstance(recipe, FamilyRecipe):
        has_heads = recipe.teacher.heads_mode != "none"
        yield from _idle("objective", recipe.objective, has_heads=has_heads)
        return
    for position, stage in enumerate(recipe.stages):
        yield from _idle(f"stages.{position}.objective", stage.objective, has_heads=True)


def _idle(key: str, objective: ObjectiveSpec, *, has_heads: bool) -> Iterator[str]:
    idle = WITHOUT_HEADS if has_heads else WITH_HEADS
    why = "students learn through heads" if has_heads else "teacher.heads: none has no such term"
    default = type(objective)()
    for name in idle:
        value = getattr(objective, name)
        if value != getattr(default, name):
            yield f"{key}.{name} = {value:g}: has no effect, since {why}"


def _heads_too_large(
    recipe: FamilyRecipe, teacher_recipe: TeacherRecipe | None, shape: TeacherShape
) -> Iterator[str]:
    """Students that are small beside their heads."""
    if shape.heads is None:
        return
    sizes = []
    for position, student in enumerate(recipe.students):
        spec = student.backbone_spec()
        of_heads = head_parameters(heads_of_student(student, spec, shape.heads))
        sizes.append((of_heads / spec.parameters, position, of_heads, spec.parameters))
    times, position, of_heads, of_backbone = max(sizes)
    if times <= MOST_OF_BACKBONE:
        return
    of_prototypes = sum(head.prototypes * head.bottleneck for head in shape.heads)
    key = f"students.{position}.head_widths"
    if 2 * of_prototypes > of_heads:
        fit = "teacher.fit.heads" if recipe.teacher.heads_mode == "fit" else "the teacher's heads"
        key = f"{'teacher:heads' if teacher_recipe else fit} (dino.prototypes, ibot.prototypes)"
    yield (
        f"{recipe.students[position].label}: its heads have {of_heads / 1e6:.1f} million parameters, "
        f"{times:.0f} times its backbone's {of_backbone / 1e6:.1f}; turn down {key}"
    )
