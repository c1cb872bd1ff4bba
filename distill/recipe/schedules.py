"""Keys that say how networks are trained, step by step: loss weights, rates, stages."""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from distill.recipe.types import Name, Pair, Section, science


class ObjectiveSpec(Section):
    """Weights of the loss terms; ``local`` scales the part of local crops."""

    dino: float = science(
        1.0,
        gt=0.0,
        description="Weight of the DINO loss on class tokens. The default is the published one.",
    )
    ibot: float = science(
        1.0,
        ge=0.0,
        description="Weight of the iBOT loss on masked patches; 0 turns it off. The default is the published one.",
    )
    koleo: float = science(
        0.1,
        ge=0.0,
        description="Weight of the KoLeo loss, which spreads class features apart; 0 turns it off. The default is the published one.",
    )
    local: float = science(
        1.0,
        ge=0.0,
        description="Factor of the loss part of local crops. The default 1 counts every crop alike.",
    )
    cosine: float = science(
        1.0,
        gt=0.0,
        description="Weight of the cosine distance of features, for a teacher without heads. The default makes it the main term.",
    )
    smooth_l1: float = science(
        0.1,
        ge=0.0,
        description="Weight of the smooth L1 distance of features, for a teacher without heads. The default keeps it below the cosine.",
    )


class RelationalSpec(Section):
    """Relational loss: similarities between the masked patches of a crop, the student's against the teacher's."""

    weight: float = science(1.0, gt=0.0, description="Weight of the loss.")
    form: Literal["softmax", "gram"] = science(
        "softmax",
        description="`softmax` is the KL divergence of each patch's similarities; `gram` their mean squared difference.",
    )
    temperature: float = science(
        0.07, gt=0.0, description="Temperature of the softmax on both sides; not used by `gram`."
    )


class FamilyObjectiveSpec(ObjectiveSpec):
    """A family's objective takes a relational loss and loss terms of installed packages, too."""

    relational: RelationalSpec | None = science(
        None,
        since=2,
        description="Relational loss, with and without heads; it sends nothing. Null means none.",
    )
    extra: dict[str, Annotated[float, Field(gt=0.0)]] | None = science(
        None,
        since=2,
        description="Weight of each further loss term, by its name in an installed package; no plan counts its cost. Null means none.",
    )


class GramSpec(Section):
    """Gram anchoring: which earlier EMA network is the anchor and how often it is replaced."""

    teacher: str = science(
        description="Which network is the anchor: the average at a step of an earlier stage, such as `base@200`, or `init`, what pretraining starts from."
    )
    weight: float = science(
        2.0, gt=0.0, description="Weight of the Gram loss. The default is the published one."
    )
    refresh: int = science(
        10_000,
        ge=1,
        description="Steps between two replacements of the anchor by the current average. The default is the published one.",
    )
    max_refreshes: int = science(
        3,
        ge=0,
        description="How often the anchor is replaced at most; 0 keeps the first. The default is the published one.",
    )
    resolution: float = science(
        2.0,
        ge=1.0,
        le=4.0,
        description="Factor of the global crop's side at which the anchor sees it, in full patches. The default is the published one.",
    )
    global_crops: Literal["cut", "reduced"] = science(
        "cut",
        since=3,
        description="Whether global crops are cut from the picture, or reduced from the larger crops of the anchor, as released.",
    )


class LrSpec(Section):
    """Learning rate over the steps; ``ramp`` is how it rises from 0 to its peak in the warm-up."""

    peak: float = science(gt=0.0, description="Largest learning rate, reached after the warm-up.")
    end: float = science(
        1.0e-6,
        ge=0.0,
        description="Learning rate at the last step of a cosine decay. The default is the published one.",
    )
    warmup: int = science(
        0,
        ge=0,
        description="Steps in which the rate rises from 0 to its peak. The default is none, since a good value depends on the length of the run.",
    )
    ramp: Literal["linear", "cosine"] = science(
        "linear", description="Shape of the warm-up. The default is the common one."
    )
    decay: Literal["constant", "cosine"] = science(
        "constant",
        description="Shape after the warm-up; `constant` stays at the peak, as published.",
    )
    decay_steps: int | None = science(
        None,
        since=2,
        ge=1,
        description="Last steps that a cosine decay takes. Null means all after the warm-up.",
    )
    scale: Literal["none", "sqrt_1024", "sqrt_1024_peak"] = science(
        "none",
        description="Factor of the rates: `sqrt_1024` is 4 * sqrt(batch / 1024), the released rule, `sqrt_1024_peak` the same for `peak` alone. The default takes the rates as written.",
    )


class TemperatureSpec(Section):
    """Teacher temperature: linear from start to end over the warm-up steps."""

    start: float = science(
        0.04,
        gt=0.0,
        description="Teacher temperature at step 0; lower makes sharper targets. The default is the published one.",
    )
    end: float = science(
        0.07,
        gt=0.0,
        description="Teacher temperature after the warm-up. The default is the published one.",
    )
    warmup: int = science(
        0,
        ge=0,
        description="Steps from `start` to `end`, along a line. The default 0 is `end` from the first step on.",
    )


class ScheduleSpec(Section):
    """Batch, optimiser and everything that depends on the step."""

    batch: int = science(ge=1, description="Images per step over all ranks.")
    lr: LrSpec = science(description="Learning rate over the steps.")
    weight_decay: float = science(
        0.04,
        ge=0.0,
        description="AdamW's weight decay per step, times the rate. The default is the published one.",
    )
    beta2: float = science(
        0.99,
        ge=0.0,
        lt=1.0,
        description="AdamW's decay of the second moment. The default is the published one.",
    )
    clip: float = science(
        3.0,
        gt=0.0,
        description="Largest norm of a network's gradient; a longer one is scaled down. The default is the published one.",
    )
    token_decay: bool = science(
        False,
        since=3,
        description="Weight decay of class, register and mask tokens too, as released. The default leaves them out, as biases.",
    )
    clip_by: Literal["network", "module"] = science(
        "network",
        since=2,
        description="What `clip` is the norm of: all of a network, or its backbone and each head by itself, as released.",
    )
    koleo_group: int = science(
        16,
        since=3,
        ge=2,
        description="Images that KoLeo compares with each other, consecutive ones of a batch. The default is the report's; released networks had those of a GPU.",
    )
    ema: float = science(
        0.994,
        ge=0.0,
        le=1.0,
        description="Momentum per step of the network's average, which is what is exported; it goes to `ema_end`. The default is the published one.",
    )
    teacher_temperature: TemperatureSpec = science(
        TemperatureSpec(), description="Temperature of the teacher's softmax over the steps."
    )
    freeze_prototypes: int = science(
        0,
        ge=0,
        description="Steps at the start in which the prototypes are not trained. The default 0 trains them from the first step on.",
    )
    rope_rescale: Pair | None = science(
        None,
        description="Smallest and largest random factor of the RoPE coordinates. Null means no rescaling.",
    )
    rope_draws: Literal["step", "block"] = science(
        "step",
        since=3,
        description="What each has a separate factor by `rope_rescale`, for global and for local crops: every step, or every block in every step, as released.",
    )


def _ema_end(default: float | None, since: int) -> Any:
    return science(
        default,
        since=since,
        ge=0.0,
        le=1.0,
        description="Momentum of the average at the last step, reached along a cosine. Null means constant.",
    )


def _layer_decay(since: int) -> Any:
    return science(
        1.0,
        since=since,
        gt=0.0,
        le=1.0,
        description="Factor of the rate from each block of a ViT to the one before it. The default 1 gives all blocks the same rate.",
    )


def _patch_embed_lr(since: int) -> Any:
    return science(
        1.0,
        since=since,
        gt=0.0,
        le=1.0,
        description="Further factor of the patch embedding's rate. The default 1 changes nothing.",
    )


class FamilyScheduleSpec(ScheduleSpec):
    """A family's schedule has a length; a teacher's stages have theirs."""

    steps: int = science(
        ge=1, description="Steps of the family; every student ends here unless it names fewer."
    )
    ema_end: float | None = _ema_end(1.0, since=2)
    layer_decay: float = _layer_decay(since=2)
    patch_embed_lr: float = _patch_embed_lr(since=2)


class TeacherScheduleSpec(ScheduleSpec):
    """What only pretraining has: stochastic depth, and learning rates that differ between layers."""

    weight_decay_end: float | None = science(
        None,
        ge=0.0,
        description="Weight decay at the last step, reached along a cosine. Null means constant.",
    )
    ema_end: float | None = _ema_end(None, since=1)
    drop_path: float = science(
        0.0,
        ge=0.0,
        lt=1.0,
        description="Probability that a row skips a residual branch. The default 0 is no stochastic depth.",
    )
    layer_decay: float = _layer_decay(since=1)
    patch_embed_lr: float = _patch_embed_lr(since=1)


class StageCropsSpec(Section):
    """Sizes of the crops of some of a stage's batches, in the share ``ratio``; the rest is as in ``crops``."""

    global_: int = science(
        ge=8, alias="global", description="Side in pixels of the global crops of these batches."
    )
    local: int = science(ge=8, description="Side in pixels of the local crops of these batches.")
    ratio: float = science(
        1.0,
        gt=0.0,
        description="Share of the stage's batches with these sizes, relative to the others. The default counts all alike.",
    )


class FamilyStageSpec(Section):
    """One stage of a family or of pretraining; it goes on from the stage before."""

    name: Name = science(description="Name of the stage, in metrics and for `gram.teacher`.")
    steps: int = science(ge=1, description="Steps of the stage.")
    lr: LrSpec | None = science(
        None,
        description="Learning rate of this stage, counted from its first step. Null means that the schedule's continues.",
    )
    batch: int | None = science(
        None, ge=1, description="Images per step in this stage. Null means `schedule.batch`."
    )
    ema: float | None = science(
        None,
        ge=0.0,
        le=1.0,
        description="Momentum of the average in this stage. Null means `schedule.ema`.",
    )
    crops: Annotated[tuple[StageCropsSpec, ...], Strict(False)] | None = science(
        None,
        min_length=1,
        description="Sizes of crops that take turns, each batch of one. Null means the sizes in `crops`.",
    )

    @property
    def anchor(self) -> GramSpec | None:
        """The anchor; None without one."""
        return None


class StageSpec(FamilyStageSpec):
    """One stage of pretraining, which may have an objective and a Gram anchor of its stage alone."""

    objective: ObjectiveSpec = science(
        ObjectiveSpec(), description="Weights of the loss terms in this stage."
    )
    gram: GramSpec | None = science(
        None, description="Gram anchoring in this stage. Null means none."
    )
    ramp: int = science(
        0,
        ge=0,
        since=3,
        description="Steps at the start of the stage in which the weights of the loss terms go from those of the stage before to this one's, along half a cosine. The default takes them at once.",
    )

    @property
    def anchor(self) -> GramSpec | None:
        """The anchor; None without one."""
        return self.gram
