"""The engine on one rank: every ZeRO stage and precision, micro-batches, a skipped step, save and load."""

from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from tests.gpu.clock import Figures
from tests.gpu.sizes import Sizes
from tests.gpu.world import join_world

if TYPE_CHECKING:
    from distill.engine.engine import Engine

STEPS = 2
LIMIT = {"fp32": 1e-3, "bf16": 5e-2}  # of the weights' change: sums are made in another order
IDS = 1_000_000  # stage 3 counts parameters; every engine has numbers of its own
PARTS = (1, 4)


def stages(precision: str) -> Callable[[torch.device, Sizes], Figures]:
    """The check of all stages in a precision."""

    def check(device: torch.device, sizes: Sizes) -> Figures:
        return _stages(precision, device)

    return check


def _stages(precision: str, device: torch.device) -> Figures:
    """Weights after some steps by stage and number of micro-batches, against stage 1 with one; each case saved, loaded, skipped once."""
    join_world(device)
    figures: Figures = {"problems": []}
    reference: dict[str, Tensor] | None = None
    for case, (stage, num_parts) in enumerate(product((1, 2, 3), PARTS)):
        name = f"zero {stage}, {num_parts} micro-batches"
        trained = _Trained(precision, stage, num_parts, device, 2 * case)
        before = trained.engine.full("weight")
        for _ in range(STEPS):
            trained.step()
        after = trained.engine.full("weight")
        reference = reference or after
        found = {
            "norm": float(trained.engine.grad_norm),
            "differs": _difference(after, reference, before),
            "skips": trained.skips_a_nan(),
            "goes_on": trained.goes_on(2 * case + 1),
        }
        figures[name] = found
        wrong = {
            "does not move": _difference(after, before, after) == 0.0,
            f"differs by {found['differs']:.2g}": not found["differs"] <= LIMIT[precision],
            "applies a step of NaN": not found["skips"],
            "a loaded state goes another way": not found["goes_on"] <= LIMIT[precision],
        }
        figures["problems"] += [f"{name}: {what}" for what, is_wrong in wrong.items() if is_wrong]
    return figures


class _Trained:
    """A small student in an engine, and its batch."""

    def __init__(
        self, precision: str, stage: int, num_parts: int, device: torch.device, index: int
    ) -> None:
        from tests.support.tiny import teacher

        self._case = (precision, stage, num_parts, device)
        self.engine = self._engine(index)
        self._teacher = teacher().to(device)

    def _engine(self, index: int) -> "Engine":
        from distill.engine.engine import Engine, EngineSettings
        from teacher.task import DistillationTask, TaskOptions
        from tests.support.tiny import MEAN, STD, network

        precision, stage, num_parts, device = self._case
        options = TaskOptions(masks_input=False, mean=MEAN, std=STD)
        task = DistillationTask(*network(1), options, None, 1, koleo_is_local=True).to(device)
        first_id = IDS * (index + (100 if precision == "bf16" else 0))
        settings = EngineSettings(stage, precision, 3.0, 4, num_parts, first_id=first_id)
        world = dist.group.WORLD
        assert world is not None, "the world was joined"
        return Engine(task, world, world, settings)

    def step(self, factor: float = 1.0, engine: "Engine | None" = None) -> None:
        """One step on the same eight images, without KoLeo, whose neighbours depend on the micro-batch."""
        from distill.engine.engine import StepRates
        from distill.train.student import SinkhornTargets
        from teacher.batch import PatchMasks, StudentBatch
        from teacher.losses import Objective
        from teacher.task import StepScalars
        from tests.support.tiny import crops, masks

        engine, images, num_parts = engine or self.engine, 8, self._case[2]
        device, taught = self._case[3], self._teacher
        batch = crops(images)
        batch = type(batch)(batch.global_crops.to(device), batch.local_crops.to(device))
        covered = PatchMasks.of(masks(images).to(device))
        full = StudentBatch(batch, covered, taught.teach(batch, covered), (2, 2), 0, images)
        assert taught.dino_head is not None and taught.ibot_head is not None, "tiny has heads"
        targets = SinkhornTargets(taught.dino_head, taught.ibot_head)
        assigned = targets.build_targets(full, 0.07, None)
        scalars = StepScalars(Objective(1.0, 1.0, 0.0, 1.0), 1.0, 1.0)
        length = images // num_parts
        for start in range(0, images, length):
            part = slice(start, start + length)
            inputs = (full.part(part), assigned.part(part, covered.masked(part)), scalars)
            loss = engine.forward(*inputs).total * factor
            engine.backward_and_step(loss, StepRates(1e-3, 1e-3, 0.04, 0.9))

    def skips_a_nan(self) -> bool:
        """A loss that is not finite changes no weight."""
        before = self.engine.full("weight")
        self.step(float("nan"))
        after = self.engine.full("weight")
        same = all(torch.equal(before[name], after[name]) for name in before)
        return same and not bool(self.engine.is_applied)

    def goes_on(self, index: int) -> float:
        """How far a fresh engine with the saved state ends from this one, one step later."""
        saved, other = self.engine.state(), self._engine(index)
        other.load_state(saved)
        before = self.engine.full("weight")
        self.step()
        self.step(engine=other)
        return _difference(other.full("weight"), self.engine.full("weight"), before)


def _difference(
    found: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]
) -> float:
    """Length of the difference over the length of the way from the start, or of the weights."""
    apart = sum(float((found[name] - other[name]).double().square().sum()) for name in found)
    way = sum(float((other[name] - start[name]).double().square().sum()) for name in found)
    return float((apart / max(way, 1e-30)) ** 0.5)
