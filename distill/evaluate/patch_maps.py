"""Patch features of one picture of any size, in one forward pass or in tiles.

A tile of a ViT has the RoPE coordinates that its patches have in the full picture, so equal places have equal
positions; what it lacks is the attention to patches outside it. Other networks see each tile as a picture.
Neighbours overlap by ``OVERLAP`` of a tile, where their features are blended linearly.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from distill.protocols.images import Preparation, scoring_dtype
from teacher.batch import Backbone, normalise
from teacher.vit import Tile, ViT

OVERLAP = 0.25  # of a tile's side


def fit(
    photograph: UInt8[np.ndarray, "height width 3"], longer_side_px: int, multiple: int
) -> UInt8[np.ndarray, "fitted_height fitted_width 3"]:
    """The photograph with its longer side near ``longer_side_px`` and both sides a multiple."""
    height, width = fitted_hw(photograph.shape[:2], longer_side_px, multiple)
    resized = Image.fromarray(photograph).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def fitted_hw(hw: Sequence[int], longer_side_px: int, multiple: int) -> tuple[int, int]:
    """Height and width in pixels that ``fit`` gives: each side at its nearest multiple, at least one."""
    scale = longer_side_px / max(hw)
    height, width = (max(multiple, round(side * scale / multiple) * multiple) for side in hw)
    return height, width


@torch.inference_mode()
def patch_features(
    backbone: nn.Module,
    photograph: UInt8[np.ndarray, "photo_height photo_width 3"],
    preparation: Preparation,
    *,
    tile_px: int | None = None,
    on_part: Callable[[float], None] = lambda _: None,
) -> Float[Tensor, "grid_height grid_width width"]:
    """Patch tokens of one photograph on their grid, in fp32 on the CPU.

    Args:
        backbone: satisfies ``Backbone``, is in evaluation mode and fp32, and stays on its device.
        photograph: both sides are multiples of its stride.
        preparation: mean and standard deviation that the network wants.
        tile_px: side of a tile; one forward pass without it.
        on_part: gets the part of the work that is done, from 0 to 1, at each block of the network.
    """
    first = next(backbone.parameters())
    pixels = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None].to(first.device)
    dtype = scoring_dtype(sum(each.numel() for each in backbone.parameters()), first.device)
    is_bf16 = dtype == torch.bfloat16
    stride = cast(Backbone, backbone).stride
    grid_hw = (pixels.shape[2] // stride, pixels.shape[3] // stride)
    side = max(1, (tile_px or max(photograph.shape)) // stride)
    windows = list(_windows(grid_hw, side))
    total: Tensor | None = None
    weights = torch.zeros(*grid_hw, 1)
    for index, (rows, columns) in enumerate(windows):
        part = pixels[:, :, _scaled(rows, stride), _scaled(columns, stride)]
        part = normalise(part, preparation.mean, preparation.std, dtype=torch.float32)
        has_rest = isinstance(backbone, ViT) and len(windows) > 1
        where = {"tile": Tile(grid_hw, (rows.start, columns.start))} if has_rest else {}
        with (
            _watched(backbone, lambda done, at=index: on_part((at + done) / len(windows))),  # type: ignore[misc]
            torch.autocast(first.device.type, dtype) if is_bf16 else nullcontext(),
        ):
            features = backbone(part, **where)
        found = torch.unflatten(features.patch_tokens[0].float().cpu(), 0, features.grid_hw)
        on_part((index + 1) / len(windows))
        if len(windows) == 1:
            return found
        weight = (
            _ramp(rows, grid_hw[0], side)[:, None, None]
            * _ramp(columns, grid_hw[1], side)[None, :, None]
        )
        total = torch.zeros(*grid_hw, found.shape[-1]) if total is None else total
        total[rows, columns] += weight * found
        weights[rows, columns] += weight
    assert total is not None, "a picture has a tile"
    return total.div_(weights)


def tile_shapes(hw: tuple[int, int], tile_px: int | None, stride: int) -> list[tuple[int, int]]:
    """Height and width in pixels of each forward pass."""
    side = max(1, (tile_px or max(hw)) // stride)
    grid_hw = (hw[0] // stride, hw[1] // stride)
    return [
        ((rows.stop - rows.start) * stride, (columns.stop - columns.start) * stride)
        for rows, columns in _windows(grid_hw, side)
    ]


def _windows(grid_hw: tuple[int, int], side: int) -> Iterator[tuple[slice, slice]]:
    for rows in _stretches(grid_hw[0], side):
        for columns in _stretches(grid_hw[1], side):
            yield rows, columns


def _stretches(length: int, side: int) -> list[slice]:
    """Tiles along one side in patches: all of one length, spread evenly, overlapping by ``OVERLAP`` at least."""
    if length <= side:
        return [slice(0, length)]
    overlap = min(math.ceil(side * OVERLAP), side - 1)
    count = math.ceil((length - overlap) / (side - overlap))
    starts = [round(index * (length - side) / (count - 1)) for index in range(count)]
    return [slice(start, start + side) for start in starts]


def _ramp(part: slice, length: int, side: int) -> Float[Tensor, " patches"]:
    """Weights of a tile's patches along one side: falling linearly over the overlap, 1 towards the picture's border."""
    count = part.stop - part.start
    steps = torch.arange(count, dtype=torch.float32) + 0.5
    reach = max(1.0, math.ceil(side * OVERLAP))
    weights = torch.ones(count)
    if part.start > 0:
        weights = torch.minimum(weights, steps / reach)
    if part.stop < length:
        weights = torch.minimum(weights, (count - steps) / reach)
    return weights


def _scaled(part: slice, stride: int) -> slice:
    return slice(part.start * stride, part.stop * stride)


@contextmanager
def _watched(backbone: nn.Module, on_part: Callable[[float], None]) -> Iterator[None]:
    """Calls ``on_part`` after each block: the members of the list that holds most parameters."""
    lists = [each for each in backbone.modules() if isinstance(each, nn.ModuleList)]
    blocks: Any = max(lists, key=_num_parameters, default=())
    hooks = [
        block.register_forward_hook(lambda *_, at=index: on_part((at + 1) / len(blocks)))
        for index, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
