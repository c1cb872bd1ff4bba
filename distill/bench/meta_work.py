"""One micro-batch of every network of a family on the meta device, counted phase by phase.

Networks, tasks, targets and the teacher are those that a job builds (``distill.job.build``); only the optimizer's
step, which an engine of DeepSpeed makes, is spelt out here with the operators that it runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from distill.bench.compiled_work import Compiler, Part, Parts
from distill.bench.trace import Counts, Made, count
from distill.engine.config import EngineSettings, parameter_groups
from distill.job.build import compute_dtype, freeze, objective_of, task_options
from distill.job.family import extra_terms
from distill.plan.crop_sizes import teacher_grid
from distill.plan.from_recipe import TeacherShape, crop_shapes, heads_of_student
from distill.recipe.keys import FamilyRecipe
from distill.recipe.networks import StudentSpec
from distill.train.student import SinkhornTargets
from students.objective import FeatureNormalizer, FeatureTask
from students.student import build_empty
from teacher.batch import CropBatch, PatchMasks, StudentBatch, TeacherTargets
from teacher.chunks import AS_WRITTEN, LogitSteps
from teacher.heads import Head
from teacher.shapes import HeadShape, scaled_size
from teacher.task import DistillationTask, StepScalars, TaskOptions, see_crops

META = torch.device("meta")
TEMPERATURE = 0.07  # any: it changes no count
PHASES = ("forward", "loss", "backward", "sinkhorn", "optimizer")  # of a student


@dataclass(frozen=True)
class Traced:
    """Counts of a micro-batch of ``images`` by phase, of the optimizer those of a step. ``tensors``: trained parameters."""

    width: int
    images: int
    parameters: int
    tensors: int
    phases: Mapping[str, Counts]

    @property
    def is_frozen(self) -> bool:
        """Whether it is the teacher: its phases are the backbone and what is done with its features."""
        return "heads" in self.phases

    @property
    def per_micro_batch(self) -> Counts:
        """What a micro-batch takes beside Sinkhorn, of which a step does all rows at once."""
        names = ("heads",) if self.is_frozen else ("loss", "backward")
        counted = self.phases["forward"]
        for name in names:
            counted = counted.plus(self.phases[name])
        return counted

    @property
    def fill(self) -> float:
        """The part of its tiles' work that the backbone's products do in a forward pass."""
        return self.phases["forward"].flops / self.phases["forward"].tiled_flops


@dataclass(frozen=True)
class FamilyWork:
    """A family whose micro-batches are to be counted."""

    recipe: FamilyRecipe
    teacher: TeacherShape

    @property
    def dtype(self) -> torch.dtype:
        """What its networks compute in."""
        return compute_dtype(self.recipe)

    def crops(self, images: int) -> CropBatch:
        """Crops of some images."""
        crops = self.recipe.crops
        sizes = ((2, crops.global_.size), (crops.local.count, crops.local.size))
        pixels = [
            torch.empty(images, num_crops, 3, size, size, dtype=torch.uint8, device=META)
            for num_crops, size in sizes
        ]
        stats = (
            torch.empty(images, 2, 3, device=META) if self.recipe.data.has_source_stats else None
        )
        return CropBatch(pixels[0], pixels[1], pixel_stats=stats)

    def masks(self, images: int) -> PatchMasks:
        """As many masked patches as images have on average."""
        rows, columns = self.grid_hw
        masked = round(crop_shapes(self.recipe, self.grid_hw).masked_per_image * images)
        counts = [masked // images] * images
        counts[0] += masked - sum(counts)
        flags = torch.empty(images, 2, rows * columns, dtype=torch.bool, device=META)
        return PatchMasks(flags, tuple(counts))

    @property
    def grid_hw(self) -> tuple[int, int]:
        """The teacher's patch grid."""
        return teacher_grid(self.recipe, self.teacher.spec, self.recipe.crops.global_.size)

    def batch(self, images: int) -> StudentBatch:
        """What a student gets."""
        heads, width, masks = self.teacher.heads, self.teacher.spec.width, self.masks(images)
        dims = (width, width) if heads is None else (heads[0].bottleneck, heads[1].bottleneck)
        targets = TeacherTargets(
            torch.empty(images, 2, dims[0], dtype=self.dtype, device=META),
            torch.empty(sum(masks.counts), dims[1], dtype=self.dtype, device=META),
        )
        crops, all_images = self.crops(images), self.recipe.schedule.batch
        return StudentBatch(crops, masks, targets, self.grid_hw, 0, all_images)


def trace_teacher(family: FamilyWork, compiler: Compiler | None = None) -> Traced:
    """The frozen teacher on one of its micro-batches; with a ``compiler``, its blocks compiled."""
    images, shape = family.recipe.engine.teacher_micro_batch, family.teacher
    backbone = build_empty(shape.spec.build, META, family.dtype)
    heads = None if shape.heads is None else _heads(shape.heads, family.dtype)
    teacher = freeze(family.recipe, META, backbone, heads)
    crops, masks = family.crops(images), family.masks(images)
    size = scaled_size(family.recipe.crops.global_.size, teacher.crop_scale)
    pixels = torch.empty(2 * images, 3, size, size, dtype=family.dtype, device=META)
    parts = Parts(teacher) if compiler else None
    with torch.no_grad():
        forward, _ = count(lambda: teacher.backbone(pixels))
    blocks = parts.take() if parts else []
    full, _ = count(lambda: teacher.teach(crops, masks))
    phases = {"forward": forward, "heads": full.minus(forward)}
    if compiler:
        phases["forward"] = forward.plus(compiler.change(blocks).forward)
    parameters = list(teacher.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    return Traced(shape.spec.width, images, total, 0, phases)


def trace_student(
    family: FamilyWork,
    student: StudentSpec,
    images: int,
    group: int,
    compiler: Compiler | None = None,
) -> Traced:
    """A student on a micro-batch of ``images``, and its optimizer's step on one of ``group`` ranks; with a ``compiler``, its blocks and the chunks of logits compiled."""
    task = _task(family, student).train()
    parts = Parts(task) if compiler else None
    steps = parts.steps() if parts else AS_WRITTEN
    batch, scalars = family.batch(images), StepScalars(objective_of(family.recipe.objective), 1, 1)
    called: dict[str, list[Part]] = {}

    def counted(phase: str, work: Callable[[], Made]) -> tuple[Counts, Made]:
        found = count(work)
        called[phase] = parts.take() if parts else []
        return found

    sinkhorn, targets = counted("sinkhorn", _targets(family, batch, steps))
    forward, _ = counted("forward", lambda: see_crops(task.backbone, batch, task.options, scalars))
    full, losses = counted("full", lambda: task(batch, targets, scalars))
    backward, _ = counted("backward", losses.total.backward)
    optimizer, _ = count(partial(_optimise, _shards(family.recipe, task, group), family.dtype))
    phases = dict(
        zip(PHASES, (forward, full.minus(forward), backward, sinkhorn, optimizer), strict=True)
    )
    if compiler:
        blocks = compiler.change(called["forward"])
        in_loss = [part for part in called["full"] if part.module is None]
        phases["forward"] = forward.plus(blocks.forward)
        phases["loss"] = phases["loss"].plus(compiler.change(in_loss).forward)
        chunks = compiler.change(called["backward"]).forward
        phases["backward"] = backward.plus(blocks.backward).plus(chunks)
        phases["sinkhorn"] = sinkhorn.plus(compiler.change(called["sinkhorn"]).forward)
    parameters = [each for each in task.parameters() if each.requires_grad]
    total = sum(each.numel() for each in parameters)
    return Traced(task.backbone.width, images, total, len(parameters), phases)


def _heads(shapes: tuple[HeadShape, HeadShape], dtype: torch.dtype) -> tuple[Any, Any]:
    dino, ibot = (build_empty(partial(Head, shape), META, dtype) for shape in shapes)
    return dino, ibot


def _task(family: FamilyWork, student: StudentSpec) -> Any:
    """A student's task as a job builds it, alone in its group."""
    recipe, shape, spec = family.recipe, family.teacher, student.backbone_spec()
    options: TaskOptions = task_options(
        recipe, masks_input=False, crop_scale=student.crop_scale, extra=extra_terms(recipe)
    )
    backbone = build_empty(spec.build, META, family.dtype)
    if shape.heads is None:
        widths = (spec.width, shape.spec.width)
        projectors = [
            build_empty(partial(nn.Linear, *widths), META, family.dtype) for _ in range(2)
        ]
        return FeatureTask(backbone, projectors[0], projectors[1], options, 1)  # type: ignore[arg-type]
    dino, ibot = _heads(heads_of_student(student, spec, shape.heads), family.dtype)
    return DistillationTask(backbone, dino, ibot, options, None, 1, koleo_is_local=True)


def _targets(family: FamilyWork, batch: StudentBatch, steps: LogitSteps) -> Callable[[], Any]:
    """Makes what a student is compared with: of a micro-batch, where a job makes it of the slice at once."""
    builder: FeatureNormalizer | SinkhornTargets
    if family.teacher.heads is None:
        builder = FeatureNormalizer(family.teacher.spec.width, META)
    else:
        heads = _heads(family.teacher.heads, family.dtype)
        for head in heads:
            head.prototypes.use_steps(steps)
        builder = SinkhornTargets(*heads)
    return partial(builder.build_targets, batch, TEMPERATURE, None)


def _shards(recipe: FamilyRecipe, task: nn.Module, group: int) -> list[int]:
    """Numbers that one rank of the group optimises, by parameter group."""
    settings = EngineSettings(recipe.engine.zero, recipe.engine.precision, recipe.schedule.clip, 1)
    groups = parameter_groups(task, settings)
    return [-(-sum(each.numel() for each in one["params"]) // group) for one in groups]


@torch.no_grad()
def _optimise(shards: list[int], dtype: torch.dtype) -> None:
    """A step of the optimizer on flat shards: the gradients' norm, fused AdamW, the EMA, the weights in ``dtype``."""
    for size in shards:
        weight, first, second, ema, gradient = (torch.empty(size, device=META) for _ in range(5))
        torch.linalg.vector_norm(gradient, dtype=torch.float64)
        one = torch.empty((), device=META)
        torch._fused_adamw_(
            [weight],
            [gradient],
            [first],
            [second],
            [],
            [one],
            lr=1e-4,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.04,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        torch.where(one.bool(), ema.lerp(weight, 0.1), ema, out=ema)
        weight.to(dtype)
