"""The iBOT masks of one step for the two sets of positions a rank deals with: those it teaches and those it trains on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from distill.data.mask_counts import mask_counts
from distill.data.masks import draw_masks
from distill.plan.plan import Plan
from distill.plan.traffic import Counts
from distill.recipe.inputs import MasksSpec
from distill.train.by_step import PlanSchedule
from teacher.batch import PatchMasks


@dataclass(frozen=True)
class DrawnMasks:
    """Masks on the teacher's grid, and how many patches are masked in each crop of the full batch."""

    of_share: PatchMasks
    of_required: PatchMasks
    counts: Counts


@dataclass(frozen=True)
class _Ahead:
    """A step that is being drawn for a plan; drawn again if another plan is in force by then."""

    step: int
    plan: Plan
    drawn: Future[DrawnMasks]


class StepMasks:
    """Draws masks from (seed, step, position): every rank agrees without a message. One thread draws a step ahead."""

    def __init__(
        self,
        spec: MasksSpec,
        plan_schedule: PlanSchedule,
        world_rank: int,
        grid_hw: Callable[[int], tuple[int, int]],
        seed: int,
        device: torch.device,
    ) -> None:
        """``grid_hw``: the teacher's patch grid at a step."""
        self._spec, self._seed, self._grid_hw, self._device = spec, seed, grid_hw, device
        self._plan_schedule, self._world_rank = plan_schedule, world_rank
        self._worker = ThreadPoolExecutor(1, "masks")
        self._ahead: _Ahead | None = None

    def draw(self, step: int) -> DrawnMasks:
        """The masks of one step; those of the next are drawn meanwhile."""
        ahead, self._ahead = self._ahead, None
        plan = self._plan_schedule.at(step)
        drawn = None
        if ahead is not None and ahead.step == step and ahead.plan is plan:
            drawn = ahead.drawn.result()
        next_plan = self._plan_schedule.at(step + 1)
        task = self._worker.submit(self._draw, step + 1, next_plan)
        self._ahead = _Ahead(step + 1, next_plan, task)
        drawn = drawn or self._draw(step, plan)
        if self._device.type == "cpu":
            return drawn
        of_share = drawn.of_share.to(self._device)
        is_same = drawn.of_required is drawn.of_share
        return DrawnMasks(
            of_share, of_share if is_same else drawn.of_required.to(self._device), drawn.counts
        )

    def _draw(self, step: int, plan: Plan) -> DrawnMasks:
        """Masks in the host's memory."""
        spec, grid_hw = self._spec, self._grid_hw(step)
        counts = mask_counts(
            seed=self._seed,
            step=step,
            images_global=plan.images_global,
            grid_hw=grid_hw,
            probability=spec.probability,
            ratio=spec.ratio,
        )
        share, *parts = (
            np.arange(part.start, part.stop)
            for part in (
                plan.share(self._world_rank, step),
                *plan.required_positions[self._world_rank],
            )
        )
        required_positions = np.concatenate(parts or [np.empty(0, np.int64)])
        positions = np.union1d(share, required_positions)
        masks = draw_masks(
            seed=self._seed, step=step, counts=counts, positions=positions, grid_hw=grid_hw
        )

        def of(wanted: Counts) -> PatchMasks:
            flags = masks[np.searchsorted(positions, wanted)]
            return PatchMasks(flags, tuple(counts[wanted].sum(axis=1).tolist()))

        of_share = of(share)
        return DrawnMasks(
            of_share,
            of_share if np.array_equal(share, required_positions) else of(required_positions),
            counts,
        )
