"""Keys that say how networks are trained, step by step: loss weights, rates, stages."""

from typing import Annotated, Literal

from pydantic import Strict

from distill.recipe.types import Name, Pair, Section, science


class ObjectiveSpec(Section):
    """Weights of the loss terms; ``local`` scales the part of local crops.

    With heads the terms are dino, ibot and koleo; with ``teacher.heads: none`` cosine and smooth_l1.
    """

    dino: float = science(1.0, gt=0.0)
    ibot: float = science(1.0, ge=0.0)
    koleo: float = science(0.1, ge=0.0)
    local: float = science(1.0, ge=0.0)
    cosine: float = science(1.0, gt=0.0)
    smooth_l1: float = science(0.1, ge=0.0)


class GramSpec(Section):
    """Gram anchoring: which earlier EMA network is the anchor and how often it is replaced.

    ``resolution``: the anchor looks at crops of this multiple of the global crop's size, itself a multiple of the patch.
    """

    teacher: str = science()
    weight: float = science(2.0, gt=0.0)
    refresh: int = science(10_000, ge=1)
    max_refreshes: int = science(3, ge=0)
    resolution: float = science(2.0, ge=1.0, le=4.0)


class LrSpec(Section):
    """Learning rate over the steps; ``ramp`` is how it rises from 0 to its peak in the warm-up."""

    peak: float = science(gt=0.0)
    end: float = science(1.0e-6, ge=0.0)
    warmup: int = science(0, ge=0)
    ramp: Literal["linear", "cosine"] = science("linear")
    decay: Literal["constant", "cosine"] = science("constant")
    scale: Literal["none", "sqrt_1024"] = science("none")


class TemperatureSpec(Section):
    """Teacher temperature: linear from start to end over the warm-up steps."""

    start: float = science(0.04, gt=0.0)
    end: float = science(0.07, gt=0.0)
    warmup: int = science(0, ge=0)


class ScheduleSpec(Section):
    """Batch, optimiser and everything that depends on the step."""

    batch: int = science(ge=1)
    lr: LrSpec = science()
    weight_decay: float = science(0.04, ge=0.0)
    beta2: float = science(0.99, ge=0.0, lt=1.0)
    clip: float = science(3.0, gt=0.0)
    ema: float = science(0.994, ge=0.0, le=1.0)
    teacher_temperature: TemperatureSpec = science(TemperatureSpec())
    freeze_prototypes: int = science(0, ge=0)
    rope_rescale: Pair | None = science(None)


class FamilyScheduleSpec(ScheduleSpec):
    """A family's schedule has a length; a teacher's stages have theirs."""

    steps: int = science(ge=1)


class TeacherScheduleSpec(ScheduleSpec):
    """What only pretraining has: stochastic depth, and learning rates that differ between layers.

    ``drop_path``: how often a row skips a residual branch. ``layer_decay``: factor from each block to
    the one before it. ``patch_embed_lr``: further factor of the patch embedding. ``weight_decay_end``,
    ``ema_end``: what a cosine over all steps leads to; constant without.
    """

    weight_decay_end: float | None = science(None, ge=0.0)
    ema_end: float | None = science(None, ge=0.0, le=1.0)

    drop_path: float = science(0.0, ge=0.0, lt=1.0)
    layer_decay: float = science(1.0, gt=0.0, le=1.0)
    patch_embed_lr: float = science(1.0, gt=0.0, le=1.0)


class StageCropsSpec(Section):
    """Sizes of the crops of some of a stage's batches, in the share ``ratio``; the rest is as in ``crops``."""

    global_: int = science(ge=8, alias="global")
    local: int = science(ge=8)
    ratio: float = science(1.0, gt=0.0)


class StageSpec(Section):
    """One stage of pretraining; it goes on from the stage before.

    ``lr`` counts its steps from the start of the stage; without one the schedule's goes on. ``batch``
    and ``ema`` replace the schedule's. ``crops`` are sizes that take turns, each batch of one.
    """

    name: Name = science()
    steps: int = science(ge=1)
    objective: ObjectiveSpec = science(ObjectiveSpec())
    gram: GramSpec | None = science(None)
    lr: LrSpec | None = science(None)
    batch: int | None = science(None, ge=1)
    ema: float | None = science(None, ge=0.0, le=1.0)
    crops: Annotated[tuple[StageCropsSpec, ...], Strict(False)] | None = science(None, min_length=1)
