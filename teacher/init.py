"""How matrices start."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

STD = 0.02  # released configurations
SMALLEST_FAN_IN = 384  # ViT-S, the narrowest published network: from here up the rule is plain 0.02


def init_matrix_(
    layer: nn.Linear | nn.Conv2d,
    generator: torch.Generator,
    smallest_fan_in: int = SMALLEST_FAN_IN,
) -> None:
    """Truncated normal 0.02 and zero bias; inputs narrower than ``smallest_fan_in`` keep its gain.

    std = 0.02 * sqrt(smallest_fan_in / fan_in) below it. With a plain 0.02 a network of width 96
    starts four times too quiet and spends hundreds of steps on growing.
    """
    fan_in = layer.weight[0].numel()
    std = STD * math.sqrt(max(1.0, smallest_fan_in / fan_in))
    fill_random_(layer.weight, nn.init.trunc_normal_, std, generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def fill_random_(
    target: Tensor, fill_: Callable[..., Tensor], std: float, generator: torch.Generator
) -> None:
    """Fills a parameter with numbers that ``generator`` draws where it is, in fp32.

    A parameter elsewhere, or of fewer bits, gets a copy: the same numbers on every device, rounded, and beside
    the network no more than one tensor of it.
    """
    is_there = target.device.type == generator.device.type and target.element_size() >= 4
    drawn = target if is_there else torch.empty(target.shape, device=generator.device)
    fill_(drawn, std=std, generator=generator)
    if not is_there:
        target.copy_(drawn)
