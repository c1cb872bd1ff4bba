"""The iBOT masks of one step for the two sets of positions a rank deals with: those it teaches and those it trains on."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from distill.data.masks import draw_masks, mask_counts
from distill.exchange import Counts
from distill.plan import Timetable
from distill.recipe import MasksSpec


@dataclass(frozen=True)
class DrawnMasks:
    """Masks on the teacher's grid, and how many patches are masked in each crop of the whole batch."""

    of_share: Bool[Tensor, "images 2 patches"]
    of_needs: Bool[Tensor, "images 2 patches"]
    counts: Counts


class StepMasks:
    """Draws masks from (seed, step, position): every rank agrees without a message."""

    def __init__(
        self,
        spec: MasksSpec,
        timetable: Timetable,
        world_rank: int,
        grid_hw: tuple[int, int],
        seed: int,
        device: torch.device,
    ) -> None:
        self._spec, self._seed, self._grid_hw, self._device = spec, seed, grid_hw, device
        plan = timetable.at(0)
        self._timetable, self._world_rank = timetable, world_rank
        self._images_global = plan.images_global
        parts = [np.arange(part.start, part.stop) for part in plan.needs(world_rank)]
        self._needs = np.concatenate(parts or [np.empty(0, np.int64)])

    def draw(self, step: int) -> DrawnMasks:
        """The masks of one step."""
        counts = mask_counts(
            seed=self._seed,
            step=step,
            images_global=self._images_global,
            grid_hw=self._grid_hw,
            probability=self._spec.probability,
            ratio=self._spec.ratio,
        )
        share = self._timetable.at(step).share(self._world_rank, step)
        positions = np.arange(share.start, share.stop)
        of_share = self._draw(step, positions)
        same = np.array_equal(positions, self._needs)
        return DrawnMasks(of_share, of_share if same else self._draw(step, self._needs), counts)

    def _draw(self, step: int, positions: Counts) -> Bool[Tensor, "images 2 patches"]:
        masks = draw_masks(
            seed=self._seed,
            step=step,
            images_global=self._images_global,
            positions=positions,
            grid_hw=self._grid_hw,
            probability=self._spec.probability,
            ratio=self._spec.ratio,
        )
        return masks.to(self._device)
