"""Numbers that change with the step: learning rates, weight decay, EMA momentum, teacher temperature, RoPE boxes, grid.

``StepSchedule.at`` gives all of one step. They are pure functions of the step, so every rank knows them.
"""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from distill.data.crops import CropSchedule
from distill.engine.engine import StepRates
from distill.recipe.keys import FamilyRecipe, TeacherRecipe
from distill.recipe.schedules import (
    FamilyScheduleSpec,
    LrSpec,
    ScheduleSpec,
    TeacherScheduleSpec,
)
from students.shapes import BackboneSpec
from teacher.batch import RopeScale
from teacher.losses import Objective
from teacher.task import StepScalars

SQRT_RULE_IMAGES = 1024


def learning_rate(lr: LrSpec, step: int, num_steps: int, images_global: int) -> float:
    """Warm-up to the peak along a line or half a cosine, then constant or a cosine to ``end`` at the last step.

    The cosine takes the last ``decay_steps`` steps, the peak holds until then.
    ``scale: sqrt_1024`` multiplies by 4 * sqrt(images_global / 1024), the rule of the released
    configurations, which leaves the end as it is in those of ImageNet-1k (``sqrt_1024_peak``).
    """
    scale = 1.0 if lr.scale == "none" else 4.0 * math.sqrt(images_global / SQRT_RULE_IMAGES)
    end = lr.end / scale if lr.scale == "sqrt_1024_peak" else lr.end
    if step < lr.warmup:
        risen = (step + 1) / lr.warmup
        if lr.ramp == "cosine":
            risen = 0.5 * (1.0 - math.cos(math.pi * risen))
        return scale * lr.peak * risen
    if lr.decay == "constant":
        return scale * lr.peak
    start = max(lr.warmup, num_steps - (lr.decay_steps or num_steps))
    progress = (step - start) / max(1, num_steps - 1 - start)
    return scale * (
        end + (lr.peak - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    )


def teacher_temperature(schedule: ScheduleSpec, step: int) -> float:
    """Linear from ``start`` to ``end`` over the warm-up, then constant."""
    temperature = schedule.teacher_temperature
    if step >= temperature.warmup:
        return temperature.end
    return temperature.start + (temperature.end - temperature.start) * step / temperature.warmup


def cosine(start: float, end: float | None, step: int, num_steps: int) -> float:
    """A cosine from ``start`` to ``end`` over the run; constant without an end."""
    if end is None:
        return start
    return end - (end - start) * 0.5 * (1.0 + math.cos(math.pi * step / max(1, num_steps)))


def lr_factors(
    settings: FamilyScheduleSpec | TeacherScheduleSpec, spec: BackboneSpec
) -> Callable[[str], float]:
    """A parameter's share of the learning rate by its name: less for every block further from the output, less for the patch embedding.

    Heads and the final norms learn at the full rate, block i of n at decay ** (n - i), the embeddings
    one step below the first block; a network without ViT blocks learns at the full rate. Source: BEiT
    (Bao et al. 2022), appendix; DINOv3 report, section 3.
    """
    depth = spec.equal_blocks

    def factor(name: str) -> float:
        if name.startswith("backbone.embeddings."):
            rate = settings.patch_embed_lr if ".patch_embeddings." in name else 1.0
            return rate * settings.layer_decay ** (depth + 1)
        if name.startswith("backbone.layer."):
            block = int(name.split(".")[2])
            return float(settings.layer_decay ** (depth - block))
        return 1.0

    return factor


def rope_scales(
    bounds: tuple[float, float] | None, seed: int, step: int, num_blocks: int | None = None
) -> tuple[RopeScale, RopeScale]:
    """Log-uniform RoPE box scales of the global and of the local crops, one each or one for each of ``num_blocks``; the same on every rank, 1 without bounds.

    A block's do not depend on how many there are.
    """
    if bounds is None:
        return 1.0, 1.0
    low, high = (math.log(bound) for bound in bounds)
    draw = random.Random(f"rope/{seed}/{step}")
    pairs = [
        (math.exp(draw.uniform(low, high)), math.exp(draw.uniform(low, high)))
        for _ in range(1 if num_blocks is None else num_blocks)
    ]
    if num_blocks is None:
        return pairs[0]
    return tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)


def most_blocks(recipe: FamilyRecipe | TeacherRecipe, teacher: BackboneSpec) -> int:
    """Blocks of the deepest network of a job, its teacher's shape included."""
    students = recipe.students if isinstance(recipe, FamilyRecipe) else ()
    return max(each.equal_blocks for each in (teacher, *(s.backbone_spec() for s in students)))


@dataclass(frozen=True)
class RateSchedule:
    """Learning rate, weight decay and EMA momentum of one network at every step of its run.

    ``steps``: of all of the network's run, which weight decay and momentum go over; ``lr_steps``: where
    the learning rate's schedule begins and ends. ``weight_decay`` and ``ema``: first and last value, a last
    one of None for a constant. ``freeze_prototypes``, ``freeze_backbone``: steps in which their rate is zero.
    """

    lr: LrSpec
    images_global: int
    steps: range
    lr_steps: range
    weight_decay: tuple[float, float | None]
    ema: tuple[float, float | None]
    freeze_prototypes: int
    freeze_backbone: int = 0

    def at(self, run_step: int) -> StepRates:
        """The rates of one step."""
        step, num_steps = run_step - self.steps.start, len(self.steps)
        lr = learning_rate(
            self.lr, run_step - self.lr_steps.start, len(self.lr_steps), self.images_global
        )
        return StepRates(
            lr,
            0.0 if step < self.freeze_prototypes else lr,
            cosine(*self.weight_decay, step, num_steps),
            cosine(*self.ema, step, num_steps),
            is_backbone_frozen=step < self.freeze_backbone,
        )


@dataclass(frozen=True)
class ObjectiveRamp:
    """The weights of the loss terms on their way from those of the stage before, along half a cosine over ``steps``."""

    first: Objective
    steps: range

    def at(self, run_step: int, last: Objective) -> Objective:
        """The weights of a step; ``last`` from the last of ``steps`` on. A term is never left out on the way."""
        done = run_step - self.steps.start + 1
        if done >= len(self.steps):
            return last
        pairs = {name: (start, getattr(last, name)) for name, start in vars(self.first).items()}
        return Objective(**{k: cosine(*pair, done, len(self.steps)) for k, pair in pairs.items()})


@dataclass(frozen=True)
class StepNumbers:
    """All numbers of one step, the same on every rank. ``rates``: of the networks that this rank trains, by name."""

    run_step: int
    grid_hw: tuple[int, int]
    temperature: float
    scalars: StepScalars
    rates: Mapping[str, StepRates]


@dataclass(frozen=True)
class StepSchedule:
    """All numbers of every step of a phase. ``teacher_grid``: the patch grid that masks are on, by the size of global crops; ``ramp``: how its objective begins; ``most_blocks``: of its networks."""

    settings: ScheduleSpec
    seed: int
    objective: Objective
    crops: CropSchedule
    teacher_grid: Callable[[int], tuple[int, int]]
    rates: Mapping[str, RateSchedule]
    ramp: ObjectiveRamp | None = None
    most_blocks: int = 0

    def at(self, run_step: int) -> StepNumbers:
        """The numbers of a step in the stream of samples."""
        num_blocks = self.most_blocks if self.settings.rope_draws == "block" else None
        scales = rope_scales(self.settings.rope_rescale, self.seed, run_step, num_blocks)
        objective = self.objective
        if self.ramp is not None:
            objective = self.ramp.at(run_step, objective)
        return StepNumbers(
            run_step=run_step,
            temperature=teacher_temperature(self.settings, run_step),
            scalars=StepScalars(objective, *scales),
            rates={name: each.at(run_step) for name, each in self.rates.items()},
            grid_hw=self.grid_hw(run_step),
        )

    def grid_hw(self, run_step: int) -> tuple[int, int]:
        """The teacher's patch grid on the global crops of a step."""
        return self._grids[self.crops.at(run_step).global_size]

    @cached_property
    def _grids(self) -> dict[int, tuple[int, int]]:
        """The patch grid of each size of global crops."""
        sizes = {spec.global_size for spec in self.crops.specs}
        return {size: self.teacher_grid(size) for size in sizes}
