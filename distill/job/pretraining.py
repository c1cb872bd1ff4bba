"""Phases in which a network teaches itself: its EMA stands in the teacher's place.

Everything a rank teaches it also learns, so nothing travels. ``Pretraining`` trains a teacher in
stages that go on with the same engine; ``HeadFitting`` learns heads on a frozen backbone with the
same losses.
"""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.data.depth import draw_active
from distill.errors import CheckpointError
from distill.job.build import (
    PhaseContext,
    PhaseSpec,
    RankContext,
    build_engine,
    build_phase,
    build_task,
    compute_dtype,
    freeze,
    objective_of,
    task_options,
)
from distill.plan.from_recipe import ONLINE, TeacherShape, shape_of_recipe
from distill.plan.plan import Plan
from distill.plan.pretraining import plan_stage
from distill.recipe.init_keys import INIT
from distill.recipe.keys import HEADS_PHASE, FamilyRecipe, TeacherRecipe
from distill.recipe.schedules import LrSpec, ObjectiveSpec, StageSpec
from distill.runfolder.files import make_folder, replaced, write_file
from distill.runfolder.tensor_file import encode, read_tensors
from distill.train.groups import Groups
from distill.train.phase import Phase
from distill.train.schedule import ObjectiveRamp, RateSchedule, lr_factors
from distill.train.student import SinkhornTargets, StudentTrainer
from distill.weights.initial import init_key, initial_backbone, load_initial
from students.student import build_empty, build_heads, build_network, seeded
from teacher.batch import StudentBatch
from teacher.frozen import FrozenTeacher, shard_blocks
from teacher.losses import Objective
from teacher.vit import ViT


def _objective(stage: StageSpec) -> Objective:
    """The weights of a stage's loss terms."""
    return objective_of(stage.objective, 0.0 if stage.gram is None else stage.gram.weight)


def _ema_targets(ema: FrozenTeacher) -> SinkhornTargets:
    assert ema.dino_head is not None and ema.ibot_head is not None, (
        "a network that teaches has heads"
    )
    return SinkhornTargets(ema.dino_head, ema.ibot_head)


def _say_nothing(_: str) -> None:
    """Nothing is re-planned where every rank teaches itself."""


class Pretraining:
    """The online network, its EMA and its Gram anchor over all stages of a teacher recipe, on one rank.

    With ``engine.zero: 3`` all three are sharded over the ranks: DeepSpeed shards the online network,
    the other two are gathered block by block for their forward passes.
    """

    def __init__(
        self,
        recipe: TeacherRecipe,
        groups: Groups,
        rank_context: RankContext,
        *,
        is_restored: bool = False,
    ) -> None:
        """Builds the networks; ``is_restored``: a checkpoint gives their weights. Collective over the world."""
        self.recipe, self.shape = recipe, shape_of_recipe(recipe)
        assert self.shape.heads is not None, "a pretrained teacher has heads"
        self._groups, self._rank_context = groups, rank_context
        spec, heads, device = self.shape.spec, self.shape.heads, rank_context.device
        online = build_network(spec, heads, seeded(recipe.seed, ONLINE), device)
        context = self._context(recipe.stages[0])
        self._survival = 1.0 - recipe.schedule.drop_path
        options = task_options(recipe, masks_input=True, survival=self._survival)
        self._task, init = build_task(context, ONLINE, online, options), recipe.model.init
        if init is not None and not is_restored:
            load_initial(init_key(ONLINE), init, spec, self._task)
        self.engine = build_engine(
            context, ONLINE, self._task, lr_factors(recipe.schedule, spec), init
        )
        self._is_sharded = recipe.engine.zero == 3 and groups.num_ranks > 1
        # after the engine, which has left this rank its part of the online network
        backbone, *copies = build_network(
            spec, heads, seeded(recipe.seed, ONLINE), device, compute_dtype(recipe)
        )
        self.ema = freeze(recipe, device, backbone, (copies[0], copies[1]))
        if self._is_sharded:
            self.ema.shard(groups.teacher, device)

    def _context(self, stage: StageSpec) -> PhaseContext:
        recipe = self.recipe.at_stage(stage)
        plan = plan_stage(self.recipe, stage, self._groups.num_ranks)
        return PhaseContext(
            recipe, plan, self._groups, self._rank_context, self.shape.spec, _say_nothing
        )

    def phase(self, stage: StageSpec, anchor_weights: dict[str, Tensor] | None = None) -> Phase:
        """The phase of one stage; ``anchor_weights`` come from a checkpoint when the stage is resumed. Collective over the world."""
        context, gram = self._context(stage), stage.gram
        first_step = self.recipe.first_step(stage)
        self.ema.use_anchor(None)
        if gram is not None:
            if anchor_weights is None:
                dist.barrier(group=self._groups.control)  # the first rank writes snapshots
                anchor_weights = self._read_snapshot(gram.teacher)
            self.ema.use_anchor(self._anchor(anchor_weights))
        if self._is_sharded:
            self.ema.pad_forwards(max(context.plan.largest_shares))
        placement = context.placement(ONLINE)
        group_images = self._task.options.koleo_group
        self._task.gather_koleo(is_needed=not placement.koleo_is_local(group_images))
        trainer = StudentTrainer(
            ONLINE,
            placement,
            self.engine,
            _ema_targets(self.ema),
            parts=context.parts_of(ONLINE),
            prepare=self._with_depth,
        )
        spec = PhaseSpec(
            stage.name,
            range(first_step, first_step + stage.steps),
            _objective(stage),
            {ONLINE: self._rates(stage)},
            lambda phase_step: self._after_step(stage, phase_step),
            stage,
            self._ramp(stage, first_step),
        )
        return build_phase(context, spec, self.ema, (trainer,))

    def _ramp(self, stage: StageSpec, first_step: int) -> ObjectiveRamp | None:
        """How the objective goes from that of the stage before to the stage's."""
        before = self.recipe.stages[: self.recipe.stages.index(stage)]
        if not stage.ramp or not before:
            return None
        return ObjectiveRamp(_objective(before[-1]), range(first_step, first_step + stage.ramp))

    def _rates(self, stage: StageSpec) -> RateSchedule:
        """Over all stages; where the stage sets a learning rate it goes over the stage, an EMA momentum stays as set."""
        settings, init = self.recipe.at_stage(stage).schedule, self.recipe.model.init
        steps = range(sum(s.steps for s in self.recipe.stages))
        first_step = self.recipe.first_step(stage)
        stage_steps = range(first_step, first_step + stage.steps)
        return RateSchedule(
            settings.lr,
            settings.batch,
            steps,
            lr_steps=steps if stage.lr is None else stage_steps,
            weight_decay=(settings.weight_decay, settings.weight_decay_end),
            ema=(settings.ema, None if stage.ema is not None else settings.ema_end),
            freeze_prototypes=settings.freeze_prototypes,
            freeze_backbone=0 if init is None else init.freeze_backbone,
        )

    def _with_depth(self, batch: StudentBatch, step: int) -> StudentBatch:
        """The batch with the rows that pass through each branch of the online network."""
        if self._survival == 1.0:
            return batch
        active = draw_active(
            seed=self.recipe.seed,
            step=step,
            positions=range(batch.start, batch.start + len(batch.masks)),
            num_crops=self.recipe.crops.global_.count + self.recipe.crops.local.count,
            num_blocks=self.shape.spec.equal_blocks,
            survival=self._survival,
        )
        return replace(batch, active_rows=active)

    def _after_step(self, stage: StageSpec, step: int) -> None:
        """EMA into the teaching network; snapshots that a later stage asks for; the anchor at its refresh steps."""
        self.engine.copy_ema_to(self.ema)
        reference = f"{stage.name}@{step}"
        if reference in {s.gram.teacher for s in self.recipe.stages if s.gram}:
            self._write_snapshot(reference)
        if step in refresh_steps(stage):
            self.ema.refresh_anchor()

    def _write_snapshot(self, reference: str) -> None:
        """Keeps the EMA's backbone for a later stage. Collective over the world."""
        is_first = self._groups.world_rank == 0
        weights = self.engine.full("ema", collect=is_first)
        if not is_first:
            return
        path = self._snapshot(reference)
        make_folder(path.parent)
        prefix = "backbone."
        backbone = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        with replaced(path) as aside:
            write_file(aside, encode(backbone))

    def _read_snapshot(self, reference: str) -> dict[str, Tensor]:
        init = self.recipe.model.init
        if reference == INIT and init is not None:
            return initial_backbone(init_key(ONLINE), init, self.shape.spec)
        path = self._snapshot(reference)
        if not path.is_file():
            raise CheckpointError(
                f"{path}: the network at {reference}, which a Gram stage starts from, is missing",
                fix="Put it back, or start over with --fresh.",
            )
        return read_tensors(path)

    def _snapshot(self, reference: str) -> Path:
        return self._rank_context.run_folder / "anchors" / f"{reference}.safetensors"

    def _anchor(self, weights: dict[str, Tensor]) -> nn.Module:
        device = self._rank_context.device
        backbone = build_empty(self.shape.spec.build, device, self.ema.dtype)
        backbone.load_state_dict(weights)
        backbone.requires_grad_(False).eval()
        if self._is_sharded:
            shard_blocks(backbone, self._groups.teacher, device)
        return backbone


def refresh_steps(stage: StageSpec) -> range:
    """Steps after which the anchor is replaced; not after the last one, where no step is left to look at it."""
    if stage.gram is None:
        return range(0)
    return range(stage.gram.refresh, stage.steps, stage.gram.refresh)[: stage.gram.max_refreshes]


class HeadFitting:
    """DINO and iBOT heads learned on a frozen backbone; the EMA of the heads makes the targets.

    The heads in training see masked global crops and local crops, the EMA sees full global crops,
    as in pretraining. Both share one copy of the backbone.
    """

    def __init__(
        self,
        recipe: FamilyRecipe,
        backbone: nn.Module,
        shape: TeacherShape,
        plan: Plan,
        groups: Groups,
        rank_context: RankContext,
    ) -> None:
        """Builds the heads; collective over the world."""
        assert shape.heads is not None, "heads to fit have shapes"
        self.recipe = recipe
        self.context = PhaseContext(recipe, plan, groups, rank_context, shape.spec, _say_nothing)
        backbone.requires_grad_(False).eval()
        heads, copies = (
            build_heads(shape.heads, seeded(recipe.seed, HEADS_PHASE), rank_context.device, dtype)
            for dtype in (torch.float32, compute_dtype(recipe))
        )
        task = build_task(
            self.context,
            HEADS_PHASE,
            (backbone, *heads),
            # nothing else has a mask token
            task_options(
                recipe,
                masks_input=isinstance(backbone, ViT),
                crop_scale=recipe.teacher.crop_scale,
            ),
        )
        self.engine = build_engine(self.context, HEADS_PHASE, task)
        self.ema = freeze(recipe, rank_context.device, backbone, copies)

    def phase(self) -> Phase:
        """The phase that fits the heads."""
        fit, objective = self.recipe.teacher.fit, self.recipe.objective
        lr = LrSpec(peak=fit.lr, end=0.0, warmup=fit.warmup, decay="cosine")
        weights = ObjectiveSpec(
            dino=objective.dino, ibot=objective.ibot, koleo=0.0, local=objective.local
        )
        settings, steps = self.recipe.schedule, range(fit.steps)
        rates = RateSchedule(
            lr,
            settings.batch,
            steps,
            lr_steps=steps,
            weight_decay=(settings.weight_decay, None),
            ema=(fit.ema, None),
            freeze_prototypes=settings.freeze_prototypes,
        )
        placement, parts = self.context.placement(HEADS_PHASE), self.context.parts_of(HEADS_PHASE)
        targets = _ema_targets(self.ema)
        trainer = StudentTrainer(HEADS_PHASE, placement, self.engine, targets, parts=parts)
        spec = PhaseSpec(
            HEADS_PHASE,
            steps,
            objective_of(weights),
            {HEADS_PHASE: rates},
            lambda _: self.engine.copy_ema_to(self.ema),
        )
        return build_phase(self.context, spec, self.ema, (trainer,))

    def heads(self) -> dict[str, torch.Tensor]:
        """The EMA of both heads by name, fp32. Collective over the world."""
        return self.engine.full("ema")
