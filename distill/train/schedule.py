"""Numbers that change with the step: learning rate, EMA momentum, teacher temperature, RoPE box. Pure functions of the step."""

import math
import random

from distill.recipe.schedules import LrSpec, ScheduleSpec

SQRT_RULE_IMAGES = 1024


def learning_rate(lr: LrSpec, step: int, num_steps: int, images_global: int) -> float:
    """Warm-up to the peak along a line or half a cosine, then constant or a cosine to ``end`` at the last step.

    ``scale: sqrt_1024`` multiplies by 4 * sqrt(images_global / 1024), the rule of the released
    configurations.
    """
    scale = 4.0 * math.sqrt(images_global / SQRT_RULE_IMAGES) if lr.scale == "sqrt_1024" else 1.0
    if step < lr.warmup:
        risen = (step + 1) / lr.warmup
        if lr.ramp == "cosine":
            risen = 0.5 * (1.0 - math.cos(math.pi * risen))
        return scale * lr.peak * risen
    if lr.decay == "constant":
        return scale * lr.peak
    progress = (step - lr.warmup) / max(1, num_steps - 1 - lr.warmup)
    return scale * (
        lr.end + (lr.peak - lr.end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
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


def rope_scales(bounds: tuple[float, float] | None, seed: int, step: int) -> tuple[float, float]:
    """One log-uniform RoPE box scale for the global and one for the local crops; the same on every rank, 1 without bounds."""
    if bounds is None:
        return 1.0, 1.0
    low, high = (math.log(bound) for bound in bounds)
    draw = random.Random(f"rope/{seed}/{step}")
    return math.exp(draw.uniform(low, high)), math.exp(draw.uniform(low, high))
