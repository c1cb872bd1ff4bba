"""What only the numbers of a file hold, not its names and shapes: the RoPE base, and whether keys have a bias.

Meta's files hold the periods of RoPE, as ``base ** (2 i / (D / 2))`` with D the width of a head, and a
bias of queries, keys and values with a mask of the same length, by which its code multiplies the bias.
The released files hold the periods of base 100 rounded to bf16 and a mask that is 0 for keys; files of
other code hold others, or none, and are computed with what they hold.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from distill.weights.containers import Container
from distill.weights.identity import RECIPROCAL_PERIODS, Identity, periods_name
from distill.weights.layouts import rope_periods
from teacher.shapes import ROPE_BASE, ViTSpec

MASK = "_mask"  # ends the name of the mask of a bias
EXACT = 1e-5  # of a period: fp32 in another order of operations
MOST_DIGITS = 7  # of a base that is looked for


def with_stored_values(
    container: Container, identity: Identity, base: float | None = None, *, has_base: bool
) -> Identity:
    """The identity with what the file's numbers add to it; ``has_base``: a config gave its RoPE base, which is ``base`` where the spec does not have it yet.

    Raises:
        ValueError: periods are not of one base, or of another one than the config's.
    """
    spec = identity.spec
    if not isinstance(spec, ViTSpec):
        return identity
    spec = spec if base is None else replace(spec, rope_base=base)
    name = periods_name(container.shapes, identity)
    if name is not None:
        stored = container.read(name).double()
        periods = 1.0 / stored if name.endswith(RECIPROCAL_PERIODS) else stored
        head_dim = spec.width // spec.heads
        if len(periods) != head_dim // 4:
            raise ValueError(
                f"{name} has {len(periods)} numbers, heads of width {head_dim} need {head_dim // 4}"
            )
        if not (has_base and _is_of(periods, spec.rope_base)):
            stored_base = base_of(periods, name)
            if has_base:
                raise ValueError(
                    f"rope_theta = {spec.rope_base:g} in its config, {name} is of {stored_base:g}"
                )
            spec = replace(spec, rope_base=stored_base)
    if identity.layout == "meta" and spec.qv_bias:
        biases = (f"blocks.{block}.attn.qkv.bias" for block in range(spec.depth))
        has_key_bias = any(
            bool(masked(container, identity, bias).chunk(3)[1].any()) for bias in biases
        )
        spec = replace(spec, key_bias=has_key_bias)
    return replace(identity, spec=spec)


def masked(container: Container, identity: Identity, name: str) -> Tensor:
    """One tensor of the backbone; a bias that has a mask is multiplied by it, as Meta's code does."""
    stored = identity.stored_name(name)
    tensor, mask = container.read(stored), stored + MASK
    return tensor * container.read(mask).to(tensor.dtype) if mask in container.shapes else tensor


def base_of(periods: Tensor, name: str) -> float:
    """The base of a file's RoPE periods: the published one if it fits, else the one with the fewest digits that does.

    Raises:
        ValueError: they are no powers of one base.
    """
    if _is_of(periods, ROPE_BASE):
        return ROPE_BASE
    count = len(periods)
    if bool((periods > 0).all()) and periods.isfinite().all():
        steps = torch.arange(count, dtype=torch.float64) / count
        fitted = math.exp(float((periods.log() * steps).sum() / (steps * steps).sum()))
        for digits in range(MOST_DIGITS):
            base = float(f"{fitted:.{digits}e}")
            if _is_of(periods, base):
                return base
    raise ValueError(
        f"{name} runs from {float(periods[0]):g} to {float(periods[-1]):g}, not as powers of one base from 1 on; "
        f"the published base {ROPE_BASE:g} ends at {float(rope_periods(4 * count)[-1]):g}"
    )


def _is_of(periods: Tensor, base: float) -> bool:
    """Periods are of a base: as fp32 has them, or rounded to bf16 or fp16."""
    wanted = rope_periods(4 * len(periods), base)
    if torch.allclose(periods, wanted.double(), rtol=EXACT, atol=0.0):
        return True
    halves = (torch.bfloat16, torch.float16)
    return any(torch.equal(wanted.to(half).double(), periods) for half in halves)
