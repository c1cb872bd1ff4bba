"""Bytes that an exchange moves, predicted from the plan: what ``distill.train.exchange`` counts must equal it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.plan.plan import Plan

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class WireShape:
    """Bytes of one image and of one patch row on the wire, for predictions; ``patches`` per crop.

    ``stat_values``: fp32 numbers about an image's source.
    """

    global_crop_values: int
    local_crop_values: int
    class_row_values: int
    patch_row_values: int
    value_bytes: int
    patches: int
    stat_values: int = 0

    @property
    def slice_image_bytes(self) -> int:
        """Of one image in ``Slices``, without its masked patches."""
        crops = self.global_crop_values + self.local_crop_values  # uint8
        return crops + self.class_row_values * self.value_bytes + 4 * self.stat_values

    @property
    def slice_patch_bytes(self) -> int:
        """Of one masked patch in ``Slices``."""
        return self.patch_row_values * self.value_bytes

    @property
    def gathered_image_bytes(self) -> int:
        """Of one image in ``AllGather``, all patches of both global crops included."""
        values = self.global_crop_values + self.local_crop_values + self.class_row_values
        values += 2 * self.patches * self.patch_row_values
        return values * self.value_bytes + 4 * self.stat_values


def slice_bytes(plan: Plan, step: int, wire: WireShape, per_image: Counts) -> list[int]:
    """Bytes that every rank receives from others in one step of ``Slices``; ``per_image`` masked patches, [images_global]."""
    if plan.is_local:
        return [0] * plan.num_ranks
    starts = plan.share_borders(step)
    masked = np.concatenate([[0], np.cumsum(per_image)])
    received = []
    for rank in range(plan.num_ranks):
        local = range(int(starts[rank]), int(starts[rank + 1]))
        images = patches = 0
        for part in plan.required_positions[rank]:
            stays = _overlap(part, local)
            images += len(part) - len(stays)
            patches += int(masked[part.stop] - masked[part.start])
            patches -= int(masked[stays.stop] - masked[stays.start]) if len(stays) else 0
        received.append(images * wire.slice_image_bytes + patches * wire.slice_patch_bytes)
    return received


def gathered_bytes(plan: Plan, wire: WireShape) -> int:
    """Bytes that every rank receives from others in one step of ``AllGather`` with even shares."""
    padded = -(-plan.images_global // plan.num_ranks)
    return (plan.num_ranks - 1) * padded * wire.gathered_image_bytes


def _overlap(one: range, other: range) -> range:
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))
