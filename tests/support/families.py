"""A family of tiny students, its batches and its trainers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.engine.engine import Engine, EngineSettings, StepRates
from distill.plan.plan import Plan
from distill.plan.traffic import WireShape
from distill.train.schedule import StepNumbers
from distill.train.student import SinkhornTargets, StudentTrainer, TargetBuilder
from students.objective import FeatureNormalizer, FeatureTask, build_projectors
from teacher.batch import CropBatch
from teacher.losses import Objective
from teacher.task import DistillationTask, StepScalars, TaskOptions
from tests.support.tiny import MEAN, STD, network, teacher

IMAGES = 32


SCALARS = StepScalars(Objective(1.0, 1.0, 0.1, 1.0, cosine=1.0, smooth_l1=1.0), 1.0, 1.0)


# 2 global crops of 16 px and 2 local ones of 8 px; bottlenecks of 6 numbers in fp32; 4 patches
WIRE = WireShape(2 * 3 * 16 * 16, 2 * 3 * 8 * 8, 2 * 6, 6, 4, 4, stat_values=6)


RATES = StepRates(lr=1e-3, lr_prototypes=1e-3, weight_decay=0.04, ema_momentum=0.9)


class Numbers:
    """The same numbers at every step."""

    def at(self, run_step: int) -> StepNumbers:
        return StepNumbers(run_step, (2, 2), 0.07, SCALARS, dict.fromkeys("abc", RATES))


def some(crops: CropBatch, images: slice) -> CropBatch:
    """Some of the images."""
    assert crops.pixel_stats is not None
    return CropBatch(
        crops.global_crops[images], crops.local_crops[images], pixel_stats=crops.pixel_stats[images]
    )


def batch_of(step: int) -> tuple[CropBatch, Tensor]:
    """The whole global batch of a step, the same on every rank."""
    generator = torch.Generator().manual_seed(100 + step)

    def draw(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    pixel_stats = 0.3 + 0.4 * torch.rand(
        IMAGES, 2, 3, generator=generator
    )  # as if from many sources
    crops = CropBatch(draw(IMAGES, 2, 3, 16, 16), draw(IMAGES, 2, 3, 8, 8), pixel_stats=pixel_stats)
    return crops, torch.rand(IMAGES, 2, 4, generator=generator) < 0.3


def take(tensor: Tensor, parts: tuple[range, ...]) -> Tensor:
    return torch.cat([tensor[p.start : p.stop] for p in parts]) if parts else tensor[:0]


@dataclass(frozen=True)
class Ways:
    """How a family is trained, apart from what it learns; ``ends``: students that finish early."""

    has_heads: bool = True
    lookahead: int = 0
    is_published: bool = False
    is_sharded: bool = False
    micro_batch: int | None = None
    ends: tuple[tuple[str, int], ...] = ()


WHOLE = Ways()


def make_pupil(
    plan: Plan, groups: Any, name: str, zero: int, precision: str, ways: Ways = WHOLE
) -> StudentTrainer:
    placement = next(p for p in plan.placements if p.name == name)
    group, group_ranks = groups.by_network[name], len(placement.slices)
    options = TaskOptions(masks_input=False, mean=MEAN, std=STD)
    backbone, *heads = network(sum(map(ord, name)))
    task: nn.Module
    targets: TargetBuilder
    if ways.has_heads:
        taught = teacher()
        assert taught.dino_head is not None and taught.ibot_head is not None
        task = DistillationTask(
            backbone, *heads, options, group, group_ranks, placement.koleo_is_local
        )
        targets = SinkhornTargets(taught.dino_head, taught.ibot_head)
    else:
        projectors = build_projectors(16, 16, torch.Generator().manual_seed(7))
        task = FeatureTask(backbone, *projectors, options, group_ranks)
        targets = FeatureNormalizer(16, torch.device("cpu"))
    parts = placement.parts_of(groups.world_rank, ways.micro_batch)
    settings = EngineSettings(zero, precision, 3.0, parts[0].stop, len(parts))
    engine = Engine(task, group, groups.alone, settings)
    end = dict(ways.ends).get(name)
    return StudentTrainer(name, placement, engine, targets, parts=parts, num_steps=end)


def metrics_of(trainer: StudentTrainer) -> dict[str, float]:
    values = trainer.read_metrics(wait=0.0)
    assert values is not None
    return values
