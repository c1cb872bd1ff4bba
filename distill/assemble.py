"""Recipe and plan to the objects of a phase: what a rank builds before its loop starts.

A family phase has a frozen teacher and its students. Pretraining has one network and its EMA in the
teacher's place, on the same ranks, so that everything a rank teaches it also learns and nothing
travels; its stages go on with the same engine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from distill import schedule
from distill.cost import CropShapes, teaching_tflops, training_tflops
from distill.data.crops import CropSpec
from distill.data.index import ImageIndex
from distill.data.loader import Loader
from distill.engine import Engine, EngineSettings, StepRates
from distill.errors import CheckpointError
from distill.exchange import Exchange
from distill.export import read_backbone, read_heads
from distill.groups import Groups
from distill.loop import Phase
from distill.masking import StepMasks
from distill.plan import Plan, Work, make_plan
from distill.pupil import Pupil
from distill.recipe import FamilyRecipe, LrSpec, ObjectiveSpec, StageSpec, TeacherRecipe
from students.catalog import BackboneSpec, build_backbone
from students.student import build_network, grid_of, seeded, student_heads
from teacher.frozen import Anchor, FrozenTeacher
from teacher.heads import Head, HeadShape
from teacher.trainee import Objective, StepScalars, Trainee, TraineeTraits

ONLINE = "teacher"  # the name of the pretrained network in metrics, checkpoints and plans
Recipe = FamilyRecipe | TeacherRecipe


@dataclass(frozen=True)
class Site:
    """Where a rank works: its device, its run folder, its threads, its images."""

    device: torch.device
    run_folder: Path
    index: ImageIndex


def crop_spec(recipe: Recipe, anchor_resolution: int | None) -> CropSpec:
    """The loader's crops for a recipe, with anchor crops where a Gram stage wants them."""
    crops = recipe.crops
    return CropSpec(
        global_size=crops.global_.size,
        global_scale=crops.global_.scale,
        num_local=crops.local.count,
        local_size=crops.local.size,
        local_scale=crops.local.scale,
        anchor_size=None if anchor_resolution is None else anchor_resolution * crops.global_.size,
        flip_probability=crops.flip,
        blur_sigma=crops.blur_sigma,
    )


def crop_shapes(recipe: Recipe, grid_hw: tuple[int, int]) -> CropShapes:
    """Sizes and counts for the cost model; two global crops, each masked with the recipe's probability and mean ratio."""
    masked = 2 * recipe.masks.probability * sum(recipe.masks.ratio) / 2 * grid_hw[0] * grid_hw[1]
    return CropShapes(
        recipe.crops.global_.size, recipe.crops.local.size, recipe.crops.local.count, masked
    )


def plan_pretraining(recipe: TeacherRecipe, num_ranks: int) -> Plan:
    """One network on all ranks, which teaches itself."""
    spec = recipe.model.backbone_spec()
    dino, ibot = _head_shapes(recipe, spec.width)
    shapes = crop_shapes(recipe, grid_of(spec, recipe.crops.global_.size))
    work = Work(ONLINE, training_tflops(spec, dino, ibot, shapes), num_ranks)
    return make_plan(
        [work], teaching_tflops(spec, dino, ibot, shapes), recipe.schedule.batch, num_ranks
    )


def plan_family(recipe: FamilyRecipe, teacher: "TeacherShape", num_ranks: int) -> Plan:
    """Students on ranks, the teacher in the gaps."""
    shapes = crop_shapes(recipe, grid_of(teacher.spec, recipe.crops.global_.size))
    works = []
    for student in recipe.students:
        spec = student.backbone_spec()
        heads = student_heads(
            spec.width,
            teacher.dino,
            teacher.ibot,
            student.head_widths.dino_hidden,
            student.head_widths.ibot_hidden,
        )
        ranks = None if student.ranks == "auto" else student.ranks
        works.append(Work(student.label, training_tflops(spec, *heads, shapes), ranks))
    cost = teaching_tflops(teacher.spec, teacher.dino, teacher.ibot, shapes)
    return make_plan(works, cost, recipe.schedule.batch, num_ranks)


@dataclass(frozen=True)
class TeacherShape:
    """A teacher before it is loaded or trained: backbone and head shapes."""

    spec: BackboneSpec
    dino: HeadShape
    ibot: HeadShape


def shape_of_recipe(recipe: TeacherRecipe) -> TeacherShape:
    """The teacher that a pretraining recipe will make."""
    spec = recipe.model.backbone_spec()
    return TeacherShape(spec, *_head_shapes(recipe, spec.width))


def _head_shapes(recipe: TeacherRecipe, width: int) -> tuple[HeadShape, HeadShape]:
    dino, ibot = recipe.heads.dino, recipe.heads.ibot
    return (
        HeadShape(width, dino.hidden, dino.bottleneck, dino.prototypes),
        HeadShape(width, ibot.hidden, ibot.bottleneck, ibot.prototypes),
    )


def _objective(spec: ObjectiveSpec, gram: float = 0.0) -> Objective:
    return Objective(dino=spec.dino, ibot=spec.ibot, koleo=spec.koleo, local=spec.local, gram=gram)


def _engine(
    network: tuple[torch.nn.Module, Head, Head],
    recipe: Recipe,
    plan: Plan,
    name: str,
    groups: Groups,
    device: torch.device,
    *,
    masks_input: bool,
) -> Engine:
    """A trainee on its group, wrapped by its own engine."""
    placement = next(p for p in plan.placements if p.name == name)
    group = groups.by_network[name]
    traits = TraineeTraits(masks_input, recipe.data.mean, recipe.data.std)
    trainee = Trainee(*network, traits, group, len(placement.slices), placement.koleo_is_local)
    settings = EngineSettings(
        zero_stage=recipe.engine.zero,
        precision=recipe.engine.precision,
        gradient_clip=recipe.schedule.clip,
        images_per_rank=len(placement.slice_of(groups.world_rank)),
    )
    return Engine(trainee.to(device), group, groups.alone, settings)


def _frozen(
    network: tuple[torch.nn.Module, Head, Head], recipe: Recipe, device: torch.device
) -> FrozenTeacher:
    teacher = FrozenTeacher(
        *network,
        mean=recipe.data.mean,
        std=recipe.data.std,
        micro_images=recipe.engine.teacher_micro_batch,
    )
    return teacher.to(
        device, torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
    )


class Pretraining:
    """The online network, its EMA and its Gram anchor over all stages of a teacher recipe, on one rank."""

    def __init__(self, recipe: TeacherRecipe, plan: Plan, groups: Groups, site: Site) -> None:
        """Builds the networks; collective over the world."""
        self.recipe, self.plan, self.groups, self.site = recipe, plan, groups, site
        self.shape = shape_of_recipe(recipe)
        self.grid_hw = grid_of(self.shape.spec, recipe.crops.global_.size)
        network = build_network(
            self.shape.spec, self.shape.dino, self.shape.ibot, seeded(recipe.seed, ONLINE)
        )
        copy = build_network(
            self.shape.spec, self.shape.dino, self.shape.ibot, seeded(recipe.seed, ONLINE)
        )
        self.engine = _engine(network, recipe, plan, ONLINE, groups, site.device, masks_input=True)
        self.ema = _frozen(copy, recipe, site.device)

    def phase(
        self, stage: StageSpec, anchor_weights: dict[str, torch.Tensor] | None = None
    ) -> Phase:
        """The phase of one stage; ``anchor_weights`` come from a checkpoint when the stage is resumed."""
        recipe, rank = self.recipe, self.groups.world_rank
        stages = list(recipe.stages)
        first_step = sum(s.steps for s in stages[: stages.index(stage)])
        num_steps = sum(s.steps for s in stages)
        gram = stage.gram
        if gram is None:
            self.ema.anchor = None
        else:
            self.ema.anchor = self._anchor(
                anchor_weights or load_file(self._snapshot(gram.teacher))
            )
        lr = stage.lr or recipe.schedule.lr
        rates = _rates(recipe, lr, lambda _: recipe.schedule.ema, num_steps)
        objective = _objective(stage.objective, 0.0 if gram is None else gram.weight)
        pupil = Pupil(ONLINE, self.plan.placements[0], self.engine, rates)
        return Phase(
            name=stage.name,
            num_steps=stage.steps,
            first_step=first_step,
            plan=self.plan,
            world_rank=rank,
            grid_hw=self.grid_hw,
            loader=_loader(
                recipe, self.plan, rank, self.site, None if gram is None else gram.resolution
            ),
            masks=StepMasks(
                recipe.masks, self.plan, rank, self.grid_hw, recipe.seed, self.site.device
            ),
            teacher=self.ema,
            exchange=Exchange(self.plan, rank, self.groups.exchange, self.site.device),
            pupils=(pupil,),
            temperature=lambda step: schedule.teacher_temperature(recipe.schedule, step),
            scalars=_scalars(recipe, objective),
            after_step=lambda step: self._after_step(stage, step),
        )

    def _after_step(self, stage: StageSpec, step: int) -> None:
        """EMA into the teaching network; snapshots that a later stage asks for; the anchor at its refresh steps."""
        self.engine.copy_ema_to(self.ema)
        if self.groups.world_rank == 0 and f"{stage.name}@{step}" in self._wanted_snapshots():
            path = self._snapshot(f"{stage.name}@{step}")
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".part")
            save_file(
                {
                    k: v.float().cpu().contiguous()
                    for k, v in self.ema.backbone.state_dict().items()
                },
                aside,
            )
            aside.rename(path)
        gram = stage.gram
        if gram and step % gram.refresh == 0 and step // gram.refresh <= gram.max_refreshes:
            self.ema.anchor = self._anchor(self.ema.backbone.state_dict())

    def _wanted_snapshots(self) -> set[str]:
        return {stage.gram.teacher for stage in self.recipe.stages if stage.gram}

    def _snapshot(self, moment: str) -> Path:
        return self.site.run_folder / "anchors" / f"{moment}.safetensors"

    def _anchor(self, weights: dict[str, torch.Tensor]) -> Anchor:
        backbone = build_backbone(self.shape.spec)
        backbone.load_state_dict(weights)
        backbone.requires_grad_(False).eval()
        dtype = self.ema.dino_head.prototypes.weight.dtype
        return Anchor(backbone.to(self.site.device, dtype), self.grid_hw)


def load_teacher(
    recipe: FamilyRecipe, folder: Path, heads: Path, device: torch.device
) -> tuple[FrozenTeacher, TeacherShape]:
    """A teacher from its folder and heads file.

    Raises:
        CheckpointError: files are missing, damaged, or do not fit each other.
    """
    backbone, spec = read_backbone(folder)
    dino, ibot = read_heads(heads, spec.width)
    return _frozen((backbone, dino, ibot), recipe, device), TeacherShape(
        spec, dino.shape, ibot.shape
    )


def family_phase(
    recipe: FamilyRecipe,
    name: str,
    plan: Plan,
    groups: Groups,
    site: Site,
    teacher: FrozenTeacher,
    shape: TeacherShape,
) -> Phase:
    """The distillation phase: one engine per student this rank trains. Collective over the world."""
    rank = groups.world_rank
    size = recipe.crops.global_.size
    grid_hw = grid_of(shape.spec, size)
    pupils = []
    for student, placement in zip(recipe.students, plan.placements, strict=True):
        if rank not in placement.world_ranks:
            continue
        spec = student.backbone_spec()
        student_grid = grid_of(spec, size)
        if student_grid[0] > grid_hw[0]:
            raise CheckpointError(
                f"students.{student.label}: its {student_grid} patch grid is finer than the teacher's {grid_hw}",
                fix="Choose a student whose stride is at least the teacher's patch size.",
            )
        heads = student_heads(
            spec.width,
            shape.dino,
            shape.ibot,
            student.head_widths.dino_hidden,
            student.head_widths.ibot_hidden,
        )
        network = build_network(spec, *heads, seeded(recipe.seed, student.label))
        engine = _engine(
            network, recipe, plan, student.label, groups, site.device, masks_input=False
        )
        lr = recipe.schedule.lr
        if student.lr is not None:
            lr = lr.model_copy(update={"peak": student.lr})
        pupils.append(Pupil(student.label, placement, engine, _student_rates(recipe, lr)))
    return Phase(
        name=name,
        num_steps=recipe.schedule.steps,
        first_step=0,
        plan=plan,
        world_rank=rank,
        grid_hw=grid_hw,
        loader=_loader(recipe, plan, rank, site, None),
        masks=StepMasks(recipe.masks, plan, rank, grid_hw, recipe.seed, site.device),
        teacher=teacher,
        exchange=Exchange(plan, rank, groups.exchange, site.device),
        pupils=tuple(pupils),
        temperature=lambda step: schedule.teacher_temperature(recipe.schedule, step),
        scalars=_scalars(recipe, _objective(recipe.objective)),
        after_step=lambda _: None,
    )


def _student_rates(recipe: FamilyRecipe, lr: LrSpec) -> Callable[[int], StepRates]:
    num_steps = recipe.schedule.steps
    return _rates(
        recipe,
        lr,
        lambda step: schedule.student_momentum(recipe.schedule.ema, step, num_steps),
        num_steps,
    )


def _rates(
    recipe: Recipe, lr: LrSpec, momentum: Callable[[int], float], num_steps: int
) -> Callable[[int], StepRates]:
    settings = recipe.schedule

    def rates(step: int) -> StepRates:
        value = schedule.learning_rate(lr, step, num_steps, settings.batch)
        frozen = step < settings.freeze_prototypes
        return StepRates(value, 0.0 if frozen else value, settings.weight_decay, momentum(step))

    return rates


def _scalars(recipe: Recipe, objective: Objective) -> Callable[[int], StepScalars]:
    bounds = recipe.schedule.rope_rescale
    return lambda step: StepScalars(objective, *schedule.rope_scales(bounds, recipe.seed, step))


def _loader(
    recipe: Recipe, plan: Plan, rank: int, site: Site, anchor_resolution: int | None
) -> Loader:
    return Loader(
        site.index,
        crop_spec(recipe, anchor_resolution),
        seed=recipe.seed,
        images_global=plan.images_global,
        positions=plan.shares[rank],
        num_threads=recipe.data.num_threads,
        device=site.device,
    )
