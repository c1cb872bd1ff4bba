"""A family of tiny students: its batches, its trainers, and the phase that the real loop trains it in."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill.engine.config import EngineSettings
from distill.engine.engine import Engine, StepRates
from distill.plan.plan import Plan, without
from distill.plan.traffic import WireShape
from distill.train.by_step import PlanSchedule
from distill.train.exchange import AllGather, Slices
from distill.train.groups import Groups
from distill.train.masking import DrawnMasks
from distill.train.phase import Phase
from distill.train.schedule import StepNumbers
from distill.train.student import SinkhornTargets, Stopwatch, StudentTrainer, TargetBuilder
from students.batch_norm import group_norms
from students.custom import Adapted
from students.objective import FeatureNormalizer, FeatureTask, build_projectors
from students.relational import relational_term
from students.shapes import CustomSpec
from teacher.batch import CropBatch, PatchMasks
from teacher.frozen import FrozenTeacher
from teacher.losses import ExtraTerm, Objective
from teacher.shapes import KOLEO_GROUP
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


def batch_of(step: int, side: int = 16, images: int = IMAGES) -> tuple[CropBatch, Tensor]:
    """The whole global batch of a step, the same on every rank; ``side``: pixels of global crops."""
    generator = torch.Generator().manual_seed(100 + step)

    def draw(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    pixel_stats = 0.3 + 0.4 * torch.rand(
        images, 2, 3, generator=generator
    )  # as if from many sources
    sides = (side, side), (side // 2, side // 2)
    globals_, locals_ = (draw(images, 2, 3, *hw) for hw in sides)
    crops = CropBatch(globals_, locals_, pixel_stats=pixel_stats)
    return crops, torch.rand(images, 2, 4, generator=generator) < 0.3


def take(tensor: Tensor, parts: tuple[range, ...]) -> Tensor:
    return torch.cat([tensor[p.start : p.stop] for p in parts]) if parts else tensor[:0]


@dataclass(frozen=True)
class Ways:
    """How a family is trained, apart from what it learns; ``ends``: students that finish early; ``has_norms``: students have BatchNorm; ``crop_scale``: all networks see larger crops at this part of their size; ``images``: of a batch; ``koleo_group``: images that KoLeo compares."""

    has_heads: bool = True
    lookahead: int = 0
    is_published: bool = False
    is_sharded: bool = False
    micro_batch: int | None = None
    ends: tuple[tuple[str, int], ...] = ()
    has_norms: bool = False
    crop_scale: float = 1.0
    images: int = IMAGES
    koleo_group: int = KOLEO_GROUP

    @property
    def side(self) -> int:
        """Pixels of a global crop, of which networks see 16."""
        return round(16 / self.crop_scale)

    @property
    def wire(self) -> WireShape:
        """What travels."""
        crops = {"global_crop_values": self.side**2 * 6, "local_crop_values": self.side**2 * 6 // 4}
        return replace(WIRE, **crops)


WHOLE = Ways()


class Normed(nn.Module):
    """The smallest custom network with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 8, 8, bias=False), nn.BatchNorm2d(16), nn.GELU(), nn.Conv2d(16, 16, 1)
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        patch_map = self.layers(image)
        return patch_map.mean(dim=(2, 3)), patch_map


def normed_backbone(seed: int) -> Adapted:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        spec = CustomSpec("tests:Normed", "{}", 16, 8, 0, has_batch_norm=True)
        backbone = Adapted(spec, Normed())
    group_norms(backbone)
    return backbone


def make_pupil(
    plan: Plan, groups: Groups, name: str, zero: int, precision: str, ways: Ways = WHOLE
) -> StudentTrainer:
    placement = next(p for p in plan.placements if p.name == name)
    group, group_ranks = groups.by_network[name], len(placement.slices)
    relational = ExtraTerm("relational", 0.5, relational_term("softmax", 0.07))
    extra = () if ways.has_heads else (relational,)
    size = ways.koleo_group
    options = TaskOptions(False, MEAN, STD, ways.crop_scale, extra=extra, koleo_group=size)
    backbone, *heads = network(sum(map(ord, name)))
    if ways.has_norms:
        backbone = normed_backbone(sum(map(ord, name)))
    task: nn.Module
    targets: TargetBuilder
    if ways.has_heads:
        taught = teacher()
        assert taught.dino_head is not None and taught.ibot_head is not None
        task = DistillationTask(
            backbone, *heads, options, group, group_ranks, placement.koleo_is_local(size)
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


class Loader:
    """Cuts a rank's share out of the batch of a step."""

    wait_s = 0.0

    def __init__(self, plan_schedule: PlanSchedule, rank: int, side: int = 16) -> None:
        self._plan_schedule, self._rank, self._side = plan_schedule, rank, side

    def fetch(self, step: int) -> CropBatch:
        plan = self._plan_schedule.at(step)
        share = plan.share(self._rank, step)
        batch, _ = batch_of(step, self._side, plan.images_global)
        return some(batch, slice(share.start, share.stop))

    def make_room(self, max_images: int) -> None:
        """Any share fits."""

    def close(self) -> None:
        """Nothing to end."""


class Masks:
    """Gives the masks that belong to the batch of a step."""

    def __init__(self, plan_schedule: PlanSchedule, rank: int) -> None:
        self._plan_schedule, self._rank = plan_schedule, rank

    def draw(self, step: int) -> DrawnMasks:
        plan = self._plan_schedule.at(step)
        masks = batch_of(step, images=plan.images_global)[1]
        share = plan.share(self._rank, step)
        return DrawnMasks(
            PatchMasks.of(masks[share.start : share.stop]),
            PatchMasks.of(take(masks, plan.required_positions[self._rank])),
            masks.sum(dim=2).numpy(),
        )


class NoSaver:
    """Saves nothing: to keep the good states is the fault handler's part."""

    def report(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def save(self, phase: object, step: int, held: object) -> None:
        pass


def frozen_teacher(plan: Plan, groups: Groups, ways: Ways) -> FrozenTeacher:
    """The teacher, its weights cut over all ranks where ``ways`` says so."""
    taught = teacher(4, has_heads=ways.has_heads, crop_scale=ways.crop_scale)
    if ways.is_sharded:
        whole = sum(p.numel() for p in taught.backbone.parameters())
        taught.shard(groups.teacher, torch.device("cpu"))
        taught.pad_forwards(max(plan.largest_shares))
        parts = [p.to_local().numel() for p in taught.backbone.parameters()]  # type: ignore[attr-defined]
        assert sum(parts) < whole / plan.num_ranks * 1.3  # rows do not divide evenly
    return taught


def family_phase(
    plan: Plan,
    groups: Groups,
    num_steps: int,
    ways: Ways = WHOLE,
    zero: int = 1,
    precision: str = "fp32",
) -> Phase:
    """What ``run_phase`` needs to train the family of a plan on this rank."""
    rank, cpu = groups.world_rank, torch.device("cpu")
    ends = [(end, without(plan, {name})) for name, end in ways.ends]
    plan_schedule = PlanSchedule(plan, ends)
    exchange = (AllGather if ways.is_published else Slices)(
        plan_schedule, rank, groups.exchange, cpu
    )
    trainers = tuple(
        make_pupil(plan, groups, placement.name, zero, precision, ways)
        for placement in plan.placements
        if rank in placement.world_ranks
    )
    return Phase(
        name="family",
        num_steps=num_steps,
        first_step=0,
        lookahead=ways.lookahead,
        plan=plan,
        plan_schedule=plan_schedule,
        world_rank=rank,
        schedule=Numbers(),
        loader=Loader(plan_schedule, rank, ways.side),
        masks=Masks(plan_schedule, rank),
        teacher=frozen_teacher(plan, groups, ways),
        teaching=Stopwatch(cpu),
        exchange=exchange,
        trainers=trainers,
        after_step=None,
        has_frozen_teacher=True,
    )
