"""Teacher targets and crops to the ranks that train on them. The only traffic between groups.

Each rank receives exactly the positions its students need, by one all-to-all with uneven splits per
tensor. Every rank computes all splits from the plan and the step's mask counts, so no sizes are
sent. What is on the wire: uint8 crops, and bottlenecks in the teacher's dtype, class tokens and
masked patches only. Masks are not sent: they are a function of (seed, step, position).
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from distill.plan import Placement, Plan
from teacher.batch import CropBatch, LessonBatch, TeacherTargets

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Delivery:
    """Crops and targets of the positions one rank needs, ascending; ``positions`` says which."""

    crops: CropBatch
    targets: TeacherTargets
    masks: Tensor
    positions: tuple[range, ...]
    counts: Counts


class Exchange:
    """Delivers each step's crops and targets according to one plan. ``wait_s`` and ``received_bytes`` accumulate."""

    def __init__(
        self, plan: Plan, world_rank: int, group: dist.ProcessGroup, device: torch.device
    ) -> None:
        self._plan, self._world_rank, self._group, self._device = plan, world_rank, group, device
        self.needs = plan.needs(world_rank)
        self.wait_s = 0.0
        self.received_bytes = 0
        share = plan.shares[world_rank]
        self._to = [_overlaps(share, plan.needs(rank)) for rank in range(plan.num_ranks)]
        self._from = [_overlaps(other, self.needs) for other in plan.shares]

    def deliver(
        self, crops: CropBatch, targets: TeacherTargets, masks: Tensor, counts: Counts
    ) -> Delivery:
        """This rank's part of the batch. Collective over the world, unless every rank trains on what it teaches.

        Args:
            crops: this rank's teacher share.
            targets: what the teacher says of it.
            masks: masks of the positions this rank *needs*.
            counts: [images_global, 2] masked patches per crop of the whole batch.
        """
        per_image = counts.sum(axis=1)
        if self._plan.is_local:
            return Delivery(crops, targets, masks, self.needs, counts)
        started = time.perf_counter()
        images_out, images_in = [_size(p) for p in self._to], [_size(p) for p in self._from]
        masked_out = [int(sum(per_image[part].sum() for part in _slices(p))) for p in self._to]
        masked_in = [int(sum(per_image[part].sum() for part in _slices(p))) for p in self._from]
        rows = self._rows_out(per_image)

        def by_image(tensor: Tensor | None) -> Tensor | None:
            return (
                None if tensor is None else self._send(tensor[rows.images], images_out, images_in)
            )

        moved_crops = CropBatch(
            self._send(crops.global_crops[rows.images], images_out, images_in),
            self._send(crops.local_crops[rows.images], images_out, images_in),
        )
        moved_targets = TeacherTargets(
            self._send(targets.class_rows[rows.images], images_out, images_in),
            self._send(targets.patch_rows[rows.masked], masked_out, masked_in),
            by_image(targets.anchor_patches),
        )
        self.wait_s += time.perf_counter() - started
        return Delivery(moved_crops, moved_targets, masks, self.needs, counts)

    def _rows_out(self, per_image: Counts) -> "_Rows":
        """Rows of this rank's share in sending order: destination by destination, ascending."""
        share = self._plan.shares[self._world_rank]
        images = np.concatenate(
            [np.arange(p.start, p.stop) for parts in self._to for p in parts]
            or [np.empty(0, np.int64)]
        )
        ends = np.cumsum(per_image[share.start : share.stop])
        starts = ends - per_image[share.start : share.stop]
        local = images - share.start
        masked = [np.arange(starts[i], ends[i]) for i in local]
        return _Rows(
            torch.from_numpy(local).to(self._device),
            torch.from_numpy(np.concatenate(masked or [np.empty(0, np.int64)])).to(self._device),
        )

    def _send(self, rows: Tensor, sizes_out: list[int], sizes_in: list[int]) -> Tensor:
        received = rows.new_empty(sum(sizes_in), *rows.shape[1:])
        dist.all_to_all_single(received, rows.contiguous(), sizes_in, sizes_out, group=self._group)
        own = sizes_in[self._world_rank]
        row_bytes = received.element_size() * (received[0].numel() if len(received) else 0)
        self.received_bytes += (received.shape[0] - own) * row_bytes
        return received


@dataclass(frozen=True)
class _Rows:
    images: Tensor
    masked: Tensor


def _overlaps(share: range, needs: tuple[range, ...]) -> tuple[range, ...]:
    parts = (range(max(share.start, n.start), min(share.stop, n.stop)) for n in needs)
    return tuple(part for part in parts if len(part))


def _size(parts: tuple[range, ...]) -> int:
    return sum(len(part) for part in parts)


def _slices(parts: tuple[range, ...]) -> list[slice]:
    return [slice(part.start, part.stop) for part in parts]


def lesson_for(
    delivery: Delivery,
    placement: Placement,
    world_rank: int,
    grid_hw: tuple[int, int],
    images_global: int,
) -> LessonBatch:
    """The part of a delivery that one network trains on; views, no copies."""
    wanted = placement.slice_of(world_rank)
    before = 0
    for part in delivery.positions:
        if part.start <= wanted.start and wanted.stop <= part.stop:
            break
        before += len(part)
    first = before + wanted.start - part.start
    images = slice(first, first + len(wanted))
    held = np.concatenate(
        [delivery.counts[p.start : p.stop].sum(axis=1) for p in delivery.positions]
    )
    masked = slice(int(held[:first].sum()), int(held[: first + len(wanted)].sum()))
    crops, targets = delivery.crops, delivery.targets
    anchor = targets.anchor_patches
    return LessonBatch(
        crops=CropBatch(crops.global_crops[images], crops.local_crops[images]),
        masks=delivery.masks[images],
        targets=TeacherTargets(
            targets.class_rows[images],
            targets.patch_rows[masked],
            None if anchor is None else anchor[images],
        ),
        grid_hw=grid_hw,
        start=wanted.start,
        images_global=images_global,
    )
