"""Teacher targets and crops to the ranks that train on them. The only traffic between groups.

Two ways, the same result bit for bit:

- ``Slices``: each rank receives exactly the positions its students need, by one all-to-all with
  uneven splits per tensor. Every rank computes all splits from the plan and the step's mask counts,
  so no sizes are sent. On the wire: uint8 crops, and the teacher's rows in the teacher's dtype, class
  tokens and masked patches only.
- ``AllGather``: the published procedure, kept as the reference. Every rank receives the full batch,
  padded to equal shares: crops in the teacher's dtype, class rows, and the rows of all patches.

Masks are not sent: they are a function of (seed, step, position). ``start`` launches the step's
collectives and returns; ``wait`` on what it returned gives the delivery. Launches stand in step
order on every rank, on a separate communicator. Several steps may be in flight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distill.plan.plan import Plan
from distill.plan.traffic import Counts
from distill.train.by_step import PlanSchedule
from distill.train.student import Stopwatch
from teacher.batch import CropBatch, Delivery, PatchMasks, TeacherTargets, onto


@dataclass(frozen=True)
class Outgoing:
    """What a rank hands over for one step: its share, and what every rank knows about the batch.

    ``masks_of_required`` belong to the positions this rank *needs*; ``counts`` are masked patches per
    crop of the full batch, [images_global, 2].
    """

    step: int
    crops: CropBatch
    targets: TeacherTargets
    masks_of_required: PatchMasks
    counts: Counts


@dataclass(frozen=True)
class Pending:
    """A step's delivery on its way."""

    works: tuple[dist.Work, ...]
    finish: Callable[[], Delivery]
    alive: tuple[Tensor, ...]
    """What is being sent; it must live until the collectives are done."""


@runtime_checkable
class Exchange(Protocol):
    """One of the two ways. ``wait_s`` and ``received_bytes`` accumulate; on a GPU ``wait_s`` is what its stream waited.

    ``wants_all_patches``: the teacher's rows are to hold all patches instead of the masked ones.
    """

    wants_all_patches: bool
    received_bytes: int

    @property
    def wait_s(self) -> float:
        """Seconds blocked in ``wait`` so far."""
        ...

    def start(self, outgoing: Outgoing) -> Pending:
        """Launches a step's collectives over the world."""
        ...

    def wait(self, pending: Pending) -> Delivery:
        """Blocks until a step's delivery is complete."""
        ...


class Slices:
    """Each rank receives exactly what its students train on."""

    wants_all_patches = False

    def __init__(
        self,
        plan_schedule: PlanSchedule,
        world_rank: int,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._plan_schedule, self._rank = plan_schedule, world_rank
        self._group, self._device = group, device
        self._waits = Stopwatch(device)
        self.received_bytes = 0

    def start(self, outgoing: Outgoing) -> Pending:
        """Launches one all-to-all per tensor; none when every rank trains on what it teaches."""
        crops, targets, counts = outgoing.crops, outgoing.targets, outgoing.counts
        plan = self._plan_schedule.at(outgoing.step)
        required_positions = plan.required_positions[self._rank]
        if plan.is_local:
            delivery = Delivery(crops, targets, outgoing.masks_of_required, required_positions)
            return Pending((), lambda: delivery, ())
        routes = self._routes(plan, outgoing.step, counts.sum(axis=1))
        moved = [
            self._launch(tensor, routes.images if by_image else routes.masked)
            for tensor, by_image in (
                (crops.global_crops, True),
                (crops.local_crops, True),
                (targets.class_features, True),
                (targets.patch_features, False),
            )
        ]
        more = {"anchor": targets.anchor_patches, "pixel_stats": crops.pixel_stats}
        extra = {
            name: self._launch(tensor, routes.images)
            for name, tensor in more.items()
            if tensor is not None
        }

        def finish() -> Delivery:
            global_crops, local_crops, class_features, patch_features = (m[2] for m in moved)
            anchor, pixel_stats = (extra[name][2] if name in extra else None for name in more)
            received_crops = CropBatch(global_crops, local_crops, pixel_stats=pixel_stats)
            received_targets = TeacherTargets(class_features, patch_features, anchor)
            return Delivery(
                received_crops, received_targets, outgoing.masks_of_required, required_positions
            )

        launched = [*moved, *extra.values()]
        return Pending(tuple(m[0] for m in launched), finish, tuple(m[1] for m in launched))

    def wait(self, pending: Pending) -> Delivery:
        """Blocks until the step's all-to-alls are done."""
        if not pending.works:
            return pending.finish()
        with self._waits.running():
            for work in pending.works:
                work.wait()
            return pending.finish()

    @property
    def wait_s(self) -> float:
        """Seconds blocked in ``wait`` so far."""
        return self._waits.read_s()

    def _launch(self, rows: Tensor, route: "_Route") -> tuple[dist.Work, Tensor, Tensor]:
        sent = rows[route.rows_out].contiguous()
        received = rows.new_empty(sum(route.sizes_in), *rows.shape[1:])
        work = dist.all_to_all_single(
            received, sent, route.sizes_in, route.sizes_out, group=self._group, async_op=True
        )
        foreign = sum(route.sizes_in) - route.sizes_in[self._rank]
        self.received_bytes += foreign * received.element_size() * int(np.prod(rows.shape[1:]))
        return work, sent, received

    def _routes(self, plan: Plan, step: int, per_image: Counts) -> "_Routes":
        """Rows out in sending order (destination by destination, ascending) and all split sizes of one step."""
        rank, num_ranks = self._rank, plan.num_ranks
        borders = plan.share_borders(step)
        share_start, share_stop = int(borders[rank]), int(borders[rank + 1])
        to, starts, stops = plan.needed
        starts, stops = starts.clip(share_start, share_stop), stops.clip(share_start, share_stop)
        masked_before = np.concatenate([[0], np.cumsum(per_image)])
        sizes_out = np.zeros(num_ranks, np.int64)
        masked_out = np.zeros(num_ranks, np.int64)
        np.add.at(sizes_out, to, stops - starts)
        np.add.at(masked_out, to, masked_before[stops] - masked_before[starts])
        sizes_in = np.zeros(num_ranks, np.int64)
        masked_in = np.zeros(num_ranks, np.int64)
        for part in plan.required_positions[rank]:
            inside = borders.clip(part.start, part.stop)
            sizes_in += np.diff(inside)
            masked_in += np.diff(masked_before[inside])
        spans = [(a, b) for a, b in zip(starts.tolist(), stops.tolist(), strict=True) if b > a]
        images = [np.arange(a, b) - share_start for a, b in spans]
        origin = masked_before[share_start]
        masked = [np.arange(masked_before[a], masked_before[b]) - origin for a, b in spans]
        return _Routes(
            _Route(self._index(images), sizes_out.tolist(), sizes_in.tolist()),
            _Route(self._index(masked), masked_out.tolist(), masked_in.tolist()),
        )

    def _index(self, parts: list[Counts]) -> Tensor:
        rows = np.concatenate(parts or [np.empty(0, np.int64)])
        return onto(torch.from_numpy(rows), self._device)


@dataclass(frozen=True)
class _Route:
    rows_out: Tensor
    sizes_out: list[int]
    sizes_in: list[int]


@dataclass(frozen=True)
class _Routes:
    images: _Route
    masked: _Route


class AllGather:
    """Every rank receives the full batch, as published; it keeps the positions it needs."""

    wants_all_patches = True

    def __init__(
        self,
        plan_schedule: PlanSchedule,
        world_rank: int,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._plan_schedule, self._rank = plan_schedule, world_rank
        self._group, self._device = group, device
        self._waits = Stopwatch(device)
        self.received_bytes = 0
        self._num_ranks = plan_schedule.at(0).num_ranks
        self._padded = max(plan_schedule.at(0).largest_shares)  # even shares stay as they are

    def start(self, outgoing: Outgoing) -> Pending:
        """Launches one all-gather per tensor. ``patch_features`` hold all patches here, [images * 2 * patches, teacher_dim]."""
        crops, targets = outgoing.crops, outgoing.targets
        dtype, images = targets.class_features.dtype, len(targets.class_features)
        patches = outgoing.masks_of_required.flags.shape[2]
        by_image = [
            crops.global_crops.to(dtype),  # integers up to 255 are exact in bf16
            crops.local_crops.to(dtype),
            targets.class_features,
            targets.patch_features.view(images, 2, patches, -1),
        ]
        gathered = [self._launch(tensor) for tensor in by_image]
        pixel_stats = None if crops.pixel_stats is None else self._launch(crops.pixel_stats)

        def finish() -> Delivery:
            plan = self._plan_schedule.at(outgoing.step)
            full = [self._unpad(tensor, plan, outgoing.step) for _, _, tensor in gathered]
            global_crops, local_crops, class_features, patch_features = full
            received_crops = CropBatch(
                global_crops.to(torch.uint8),
                local_crops.to(torch.uint8),
                pixel_stats=None
                if pixel_stats is None
                else self._unpad(pixel_stats[2], plan, outgoing.step),
            )
            masked = patch_features.flatten(0, 2)[outgoing.masks_of_required.rows()]
            received_targets = TeacherTargets(class_features, masked)
            required_positions = plan.required_positions[self._rank]
            return Delivery(
                received_crops, received_targets, outgoing.masks_of_required, required_positions
            )

        launched = [*gathered, *([] if pixel_stats is None else [pixel_stats])]
        return Pending(tuple(g[0] for g in launched), finish, tuple(g[1] for g in launched))

    wait, wait_s = Slices.wait, Slices.wait_s

    def _launch(self, rows: Tensor) -> tuple[dist.Work, Tensor, Tensor]:
        padding = self._padded - rows.shape[0]
        sent = torch.cat([rows, rows.new_zeros(padding, *rows.shape[1:])])
        num_ranks = self._num_ranks
        received = rows.new_empty(num_ranks * self._padded, *rows.shape[1:])
        gather = (
            getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        )  # renamed in torch 2.13
        work = gather(received, sent, group=self._group, async_op=True)
        self.received_bytes += (num_ranks - 1) * sent.numel() * sent.element_size()
        return work, sent, received

    def _unpad(self, full: Tensor, plan: Plan, step: int) -> Tensor:
        """The rows of the positions this rank needs."""
        shares = plan.shares(step)
        padded = full.view(len(shares), self._padded, *full.shape[1:])
        batch = torch.cat([padded[rank, : len(share)] for rank, share in enumerate(shares)])
        parts = [batch[part.start : part.stop] for part in plan.required_positions[self._rank]]
        return torch.cat(parts) if parts else batch[:0]
