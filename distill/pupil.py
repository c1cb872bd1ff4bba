"""One network in training on this rank: its targets, its step, its numbers."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine import Engine, StepRates
from distill.plan import Placement
from teacher.batch import LessonBatch
from teacher.heads import Head
from teacher.sinkhorn import sinkhorn
from teacher.trainee import Losses, StepScalars


@dataclass(frozen=True)
class TaughtBy:
    """The teacher's side of the loss: whose prototypes the bottlenecks refer to, at which temperature."""

    dino_head: Head
    ibot_head: Head
    temperature: float


class Pupil:
    """A trained network on one of its ranks. Numbers stay on the device until ``read_metrics``."""

    def __init__(
        self, name: str, placement: Placement, engine: Engine, rates: Callable[[int], StepRates]
    ) -> None:
        self.name, self.placement, self.engine, self.rates = name, placement, engine, rates
        self.busy_s = 0.0
        self._sums: dict[str, Tensor] = {}
        self._num_steps = 0
        self._skipped_before = engine.num_skipped

    def learn(self, lesson: LessonBatch, taught: TaughtBy, scalars: StepScalars, step: int) -> None:
        """One step of this network. Collective over its group: Sinkhorn, KoLeo where cut, gradients."""
        started = time.perf_counter()
        group = self.engine.group if dist.get_world_size(self.engine.group) > 1 else None
        class_rows = lesson.targets.class_bottleneck.transpose(0, 1).flatten(0, 1)
        dino = sinkhorn(class_rows, taught.dino_head.prototypes.weight, taught.temperature, group)
        ibot = sinkhorn(
            lesson.targets.patch_bottleneck,
            taught.ibot_head.prototypes.weight,
            taught.temperature,
            group,
        )
        losses: Losses = self.engine.forward(lesson, dino, ibot, scalars)
        self.engine.backward_and_step(losses.total, self.rates(step))
        self._add({"loss": losses.total.detach(), **losses.parts})
        self.busy_s += time.perf_counter() - started

    def _add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.float()
        self._num_steps += 1

    def read_metrics(self, wait: float) -> dict[str, float]:
        """Means over the group since the last call: loss, its terms, ``wait``, gradient norm, steps skipped. One sync, one all-reduce.

        Collective over the network's group.
        """
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names]) / self._num_steps
        sums = torch.cat([sums, sums.new_tensor([wait])])
        if dist.get_world_size(self.engine.group) > 1:
            dist.all_reduce(sums, group=self.engine.group)
            sums /= dist.get_world_size(self.engine.group)
        values = dict(zip([*names, "wait"], sums.tolist(), strict=True))
        values["grad_norm"] = float(self.engine.grad_norm)
        values["skipped"] = self.engine.num_skipped - self._skipped_before
        self._skipped_before = self.engine.num_skipped
        self._sums, self._num_steps = {}, 0
        return values
