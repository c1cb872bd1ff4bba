"""The recipe as typed, frozen models.

Two kinds, distinguished by their keys: a *family* recipe has ``students``, a *teacher* recipe has
``stages``. The sections are in ``networks``, ``inputs`` and ``schedules``.

``distill.recipe.reader`` reads YAML into these models and reports what is wrong, where. Imports no
torch, so that the command line starts fast.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import Field, Strict

from distill.recipe.extension_keys import Extensions, Of, extensions_key
from distill.recipe.init_keys import InitSpec
from distill.recipe.inputs import CropsSpec, DataSpec, ImageStats, MasksSpec, are_same
from distill.recipe.interval_keys import CheckpointSpec, EvaluateSpec
from distill.recipe.networks import HeadsSpec, Model, Student, TeacherSource
from distill.recipe.schedules import (
    FamilyObjectiveSpec,
    FamilyScheduleSpec,
    FamilyStageSpec,
    StageSpec,
    TeacherScheduleSpec,
)
from distill.recipe.types import Format, Name, Section, machine, science

HEADS_PHASE, FAMILY_PHASE = RESERVED_PHASES = ("heads", "family")


def is_family_phase(name: str) -> bool:
    """Whether students train in the phase of this name: the family, or a stage of it."""
    return name == FAMILY_PHASE or name.startswith(f"{FAMILY_PHASE}.")


def is_ours(phase: str) -> bool:
    """Whether a phase is a family's, not of the teacher that it trains first."""
    return phase == HEADS_PHASE or is_family_phase(phase)


class EngineSpec(Section):
    """Where a job runs and how fast."""

    device: Literal["auto", "cpu", "cuda"] = machine(
        "auto", description="Where networks run. `auto` is the GPU where there is one."
    )
    processes: int | Literal["auto"] = machine(
        "auto", description="Ranks on this machine. `auto` is one per GPU, or one without."
    )
    precision: Literal["fp32", "bf16"] = science(
        "bf16",
        description="Number format of the forward and backward pass. The default is the one that modern GPUs are made for.",
    )
    zero: Literal[1, 2, 3] = machine(
        1,
        description="What is sharded over a network's ranks: 1 optimizer state, 2 gradients too, 3 weights too. The default 1 sends least.",
    )
    activation_checkpointing: bool = machine(
        False,
        description="Whether each block is computed again in the backward pass instead of stored. Off by default, since it costs a third more time.",
    )
    teacher_micro_batch: int = machine(
        16,
        ge=1,
        description="Images that a teacher takes at once. The default bounds the memory of its activations.",
    )
    teacher_sharding: Literal["auto", "replicated", "sharded"] = machine(
        "auto",
        description="Full teacher on every rank, or a part of it (ZeRO-3). `auto` takes the full one where it fits.",
    )
    micro_batch: Annotated[int, Field(ge=16, multiple_of=16)] | Literal["auto"] | None = machine(
        None,
        description="Images that a trained network takes at once, in KoLeo groups of 16. Null means all of a rank's slice; `auto` as many as memory holds, network by network.",
    )
    lookahead: int = machine(
        2,
        ge=0,
        le=16,
        description="Steps that a frozen teacher may compute ahead of its students. The default lets ranks wait less for each other.",
    )
    exchange: Literal["slices", "all_gather"] = machine(
        "slices",
        description="How targets travel: to each rank its slice, or all to all ranks as published. The default sends less.",
    )
    placed_by: Literal["flops", "measured"] = machine(
        "flops",
        since=2,
        description="What divides the ranks among students: FLOPs, or at a restart the seconds that the run measured. The default keeps the bits of a resumed run, whose sums depend on a student's number of ranks.",
    )
    balance: int = machine(
        200,
        ge=0,
        description="Steps between two measurements of every rank's speed, after which shares follow it; 0 for never. The default keeps measuring cheap.",
    )
    deterministic: bool = machine(
        False,
        since=2,
        description="Whether a GPU takes only operators that give the same bits every time. Off by default, since they are slower; a CPU always does.",
    )
    compile: bool | Literal["auto"] = machine(
        "auto",
        since=3,
        description="Whether torch's compiler joins the operators of blocks and of the loss. `auto` does on a GPU, with triton; a CPU needs `true` and a C++ compiler.",
    )
    log_every: int = machine(
        10,
        ge=1,
        since=2,
        description="Steps between two rows of metrics, when ranks also agree to save or stop: a request waits that long. The default 10 seldom waits for the device.",
    )
    ranks_per_node: int | None = machine(
        None,
        ge=1,
        since=2,
        description="Ranks on each machine; groups of ranks are laid out so that few cross from one to the next. Null takes it from the launcher; `distill plan --ranks` takes at most 8.",
    )
    hang_limit_s: float = machine(
        30.0,
        ge=2.0,
        description="Seconds after which a rank that does not move is named and the job ended. Steps and saves that took longer before may again.",
    )
    launcher: str = machine(
        "auto",
        since=2,
        description="What starts the ranks: `local`, `external`, or a launcher of an installed package. `auto` is `external` under another launcher, else `local`.",
    )
    metric_sinks: Annotated[tuple[str, ...], Strict(False)] = machine(
        (),
        since=2,
        description="Sinks of installed packages that get every row of metrics, beside `metrics/NAME.jsonl`. The default is none.",
    )


Tracker = Literal["jsonl", "tensorboard", "wandb", "mlflow", "trackio"]
Log = Annotated[tuple[Tracker, ...], Strict(False)]
FORMAT = "Number of the recipe format whose defaults hold. A recipe without it has format 1, so that an upgrade never changes what it means."
SEED = "Seed of everything that is random: weights, order of images, crops, masks."
LOG = "Trackers that get the metrics, each in a separate process. `metrics/NAME.jsonl`, which the default names, is always written."


class FamilyRecipe(Section):
    """Distils every student from one frozen teacher, in one job."""

    name: Name = machine(description="Name of the run's folder.")
    format: Format = machine(1, description=FORMAT)
    seed: int = science(0, ge=0, description=SEED)
    teacher: TeacherSource = science(
        description="The frozen teacher: a recipe to train first, or its weights."
    )
    students: Annotated[tuple[Student, ...], Strict(False)] = science(
        min_length=1,
        description="The students, all distilled in one job; a bare text is an architecture.",
    )
    data: DataSpec = science(description="Images and how their pixels are normalised.")
    crops: CropsSpec = science(CropsSpec(), description="Crops of every image.")
    masks: MasksSpec = science(MasksSpec(), description="Masks of the iBOT loss.")
    objective: FamilyObjectiveSpec = science(
        FamilyObjectiveSpec(), description="Weights of the loss terms."
    )
    schedule: FamilyScheduleSpec = science(
        description="Batch, optimiser and everything that changes with the step."
    )
    stages: Annotated[tuple[FamilyStageSpec, ...], Strict(False)] | None = science(
        None,
        since=3,
        min_length=1,
        description="Stages of the family, in order; their steps add up to `schedule.steps`. Null means one stretch of steps.",
    )
    engine: EngineSpec = science(EngineSpec(), description="Where the job runs and how fast.")
    checkpoint: CheckpointSpec = machine(
        CheckpointSpec(), description="How often the job is saved and how much is left on disk."
    )
    evaluate: EvaluateSpec = machine(
        EvaluateSpec(), since=3, description="Scores of the students while they train."
    )
    log: Log = machine(("jsonl",), since=2, description=LOG)
    extensions: Extensions | None = extensions_key()

    @property
    def parts(self) -> tuple[FamilyStageSpec, ...]:
        """The stages; without any, all steps as one."""
        return self.stages or (FamilyStageSpec(name=FAMILY_PHASE, steps=self.schedule.steps),)

    def phase_of(self, stage: FamilyStageSpec) -> str:
        """Name of a stage's phase, which no stage of a teacher has."""
        return FAMILY_PHASE if self.stages is None else f"{FAMILY_PHASE}.{stage.name}"

    def at_stage(self, stage: FamilyStageSpec) -> "FamilyRecipe":
        """The recipe with the schedule that a stage has; the other stages keep theirs."""
        return self if self.stages is None else _at_stage(self, self.stages, stage)

    def first_step(self, stage: FamilyStageSpec) -> int:
        """Steps of the stages before one."""
        return _steps_before(self.parts, stage)

    def step_of(self, phase: str, phase_step: int) -> int:
        """A step of a stage's phase, counted from the family's start."""
        stages = (each for each in self.parts if self.phase_of(each) == phase)
        return sum(self.first_step(each) for each in stages) + phase_step

    def input_size_of(self, name: str) -> int:
        """Pixels per side that a finished network is scored at, the teacher included."""
        from teacher.shapes import scaled_size

        scales = {student.label: student.crop_scale for student in self.students}
        return scaled_size(self.crops.input_size, scales.get(name, self.teacher.crop_scale))


class TeacherRecipe(Section):
    """Pretrains a teacher in stages."""

    name: Name = machine(description="Name of the run's folder.")
    format: Format = machine(1, description=FORMAT)
    seed: int = science(0, ge=0, description=SEED)
    model: Model = science(
        description="The network to pretrain, a ViT; a bare text is an architecture."
    )
    heads: HeadsSpec = science(HeadsSpec(), description="Sizes of both heads.")
    data: DataSpec = science(description="Images and how their pixels are normalised.")
    crops: CropsSpec = science(CropsSpec(), description="Crops of every image.")
    masks: MasksSpec = science(MasksSpec(), description="Masks of the iBOT loss.")
    schedule: TeacherScheduleSpec = science(
        description="Batch, optimiser and everything that changes with the step."
    )
    stages: Annotated[tuple[StageSpec, ...], Strict(False)] = science(
        min_length=1,
        description="Stages of pretraining, in order; each continues with the networks of the one before.",
    )
    engine: EngineSpec = science(EngineSpec(), description="Where the job runs and how fast.")
    checkpoint: CheckpointSpec = machine(
        CheckpointSpec(), description="How often the job is saved and how much is left on disk."
    )
    log: Log = machine(("jsonl",), since=2, description=LOG)
    extensions: Extensions | None = extensions_key()

    def at_stage(self, stage: FamilyStageSpec) -> "TeacherRecipe":
        """The recipe with the schedule that a stage has; the other stages keep theirs."""
        return _at_stage(self, self.stages, stage)

    def first_step(self, stage: FamilyStageSpec) -> int:
        """Steps of the stages before one."""
        return _steps_before(self.stages, stage)

    def input_size_of(self, name: str) -> int:  # noqa: ARG002  # as of a family
        """Pixels per side that the finished network is scored at."""
        return self.crops.input_size


Recipe = FamilyRecipe | TeacherRecipe
Recipes = tuple[Recipe, TeacherRecipe | None]
Staged = TypeVar("Staged", FamilyRecipe, TeacherRecipe)


def _at_stage(recipe: Staged, stages: Sequence[FamilyStageSpec], stage: FamilyStageSpec) -> Staged:
    """The recipe with what a stage changes of its schedule."""
    by_key = {"lr": stage.lr, "batch": stage.batch, "ema": stage.ema}
    given = {key: value for key, value in by_key.items() if value is not None}
    batch = recipe.schedule.batch
    others = tuple(each.model_copy(update={"batch": each.batch or batch}) for each in stages)
    settings = recipe.schedule.model_copy(update=given)
    return recipe.model_copy(update={"schedule": settings, "stages": others})


def _steps_before(stages: Sequence[FamilyStageSpec], stage: FamilyStageSpec) -> int:
    names = [each.name for each in stages]
    return sum(each.steps for each in stages[: names.index(stage.name)])


def with_inputs(
    recipes: Recipes, stated_by: Callable[[InitSpec], ImageStats | None], old: Recipes | None
) -> Recipes:
    """The recipes with the mean and std of what pretraining starts from, where neither recipe gives them; ``old``: of the run that goes on, which hold where that is gone."""
    trained = _pretrained(recipes)
    if trained is None or trained.model.init is None:
        return recipes
    before = None if old is None else _pretrained(old)
    theirs = stated_by(trained.model.init) or (None if before is None else before.data)
    recipe, teacher = recipes
    given = recipe.data.model_fields_set | trained.data.model_fields_set
    stated = {key: getattr(theirs, key, None) for key in {"mean", "std"} - given}
    update = {
        key: value
        for key, value in stated.items()
        if value is not None and not are_same(getattr(recipe.data, key), value)
    }
    if teacher is not None:
        teacher = teacher.model_copy(update={"data": teacher.data.model_copy(update=update)})
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=update)}), teacher


def _pretrained(recipes: Recipes) -> TeacherRecipe | None:
    return next((each for each in recipes if isinstance(each, TeacherRecipe)), None)


def extension(recipe: Recipe, kind: type[Of]) -> Of | None:
    """Returns the section of an installed package; None where the recipe does not name it."""
    sections = [] if recipe.extensions is None else vars(recipe.extensions).values()
    return next((section for section in sections if isinstance(section, kind)), None)
