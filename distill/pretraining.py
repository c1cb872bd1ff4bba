"""Phases in which a network teaches itself: its EMA stands in the teacher's place.

Everything a rank teaches it also learns, so nothing travels. ``Pretraining`` trains a teacher in
stages that go on with the same engine; ``HeadFitting`` learns heads on a frozen backbone with the
same losses.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.assemble import (
    ONLINE,
    Scene,
    Site,
    TeacherShape,
    build_engine,
    build_phase,
    build_trainee,
    freeze,
    objective_of,
    shape_of_recipe,
    step_rates,
    traits_of,
)
from distill.groups import Groups
from distill.loop import Phase
from distill.plan import Plan
from distill.pupil import Assigner, Pupil
from distill.recipe import (
    HEADS_PHASE,
    FamilyRecipe,
    LrSpec,
    ObjectiveSpec,
    StageSpec,
    TeacherRecipe,
)
from students.catalog import build_backbone
from students.student import build_heads, build_network, grid_of, seeded
from teacher.frozen import Anchor, FrozenTeacher
from teacher.vit import ViT


def _own_targets(ema: FrozenTeacher) -> Assigner:
    assert ema.dino_head is not None and ema.ibot_head is not None, (
        "a network that teaches has heads"
    )
    return Assigner(ema.dino_head, ema.ibot_head)


def _say_nothing(_: str) -> None:
    """Nothing is re-planned where every rank teaches itself."""


class Pretraining:
    """The online network, its EMA and its Gram anchor over all stages of a teacher recipe, on one rank."""

    def __init__(self, recipe: TeacherRecipe, plan: Plan, groups: Groups, site: Site) -> None:
        """Builds the networks; collective over the world."""
        self.recipe, self.shape = recipe, shape_of_recipe(recipe)
        assert self.shape.heads is not None, "a pretrained teacher has heads"
        spec, heads = self.shape.spec, self.shape.heads
        grid_hw = grid_of(spec, recipe.crops.global_.size)
        self.scene = Scene(recipe, plan, groups, site, grid_hw, _say_nothing)
        online = build_network(spec, *heads, seeded(recipe.seed, ONLINE))
        backbone, *copies = build_network(spec, *heads, seeded(recipe.seed, ONLINE))
        traits = traits_of(recipe, masks_input=True)
        trainee = build_trainee(self.scene, ONLINE, online, traits)
        self.engine = build_engine(self.scene, ONLINE, trainee)
        self.ema = freeze(recipe, site.device, backbone, (copies[0], copies[1]))

    def phase(self, stage: StageSpec, anchor_weights: dict[str, Tensor] | None = None) -> Phase:
        """The phase of one stage; ``anchor_weights`` come from a checkpoint when the stage is resumed."""
        recipe, gram = self.recipe, stage.gram
        stages = list(recipe.stages)
        first_step = sum(s.steps for s in stages[: stages.index(stage)])
        self.ema.anchor = None
        if gram is not None:
            weights = anchor_weights or load_file(self._snapshot(gram.teacher))
            self.ema.anchor = self._anchor(weights)
        num_steps = sum(s.steps for s in stages)
        lr = stage.lr or recipe.schedule.lr
        rates = step_rates(recipe.schedule, lr, lambda _: recipe.schedule.ema, num_steps)
        placement, parts = self.scene.placement(ONLINE), self.scene.parts_of(ONLINE)
        targets = _own_targets(self.ema)
        pupil = Pupil(ONLINE, placement, self.engine, rates, targets, parts=parts)
        return build_phase(
            self.scene,
            stage.name,
            (first_step, stage.steps),
            self.ema,
            (pupil,),
            objective_of(stage.objective, 0.0 if gram is None else gram.weight),
            lambda step: self._after_step(stage, step),
            anchor_resolution=None if gram is None else gram.resolution,
        )

    def _after_step(self, stage: StageSpec, step: int) -> None:
        """EMA into the teaching network; snapshots that a later stage asks for; the anchor at its refresh steps."""
        self.engine.copy_ema_to(self.ema)
        moment = f"{stage.name}@{step}"
        if self.scene.groups.world_rank == 0 and moment in self._wanted_snapshots():
            path = self._snapshot(moment)
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = path.with_suffix(".part")
            weights = self.ema.backbone.state_dict()
            save_file({k: v.float().cpu().contiguous() for k, v in weights.items()}, aside)
            aside.rename(path)
        gram = stage.gram
        if gram and step % gram.refresh == 0 and step // gram.refresh <= gram.max_refreshes:
            self.ema.anchor = self._anchor(self.ema.backbone.state_dict())

    def _wanted_snapshots(self) -> set[str]:
        return {stage.gram.teacher for stage in self.recipe.stages if stage.gram}

    def _snapshot(self, moment: str) -> Path:
        return self.scene.site.run_folder / "anchors" / f"{moment}.safetensors"

    def _anchor(self, weights: dict[str, Tensor]) -> Anchor:
        backbone = build_backbone(self.shape.spec)
        backbone.load_state_dict(weights)
        backbone.requires_grad_(False).eval()
        return Anchor(backbone.to(self.scene.site.device, self.ema.dtype), self.scene.grid_hw)


class HeadFitting:
    """DINO and iBOT heads learned on a frozen backbone; the EMA of the heads makes the targets.

    The heads in training see masked global crops and local crops, the EMA sees whole global crops,
    as in pretraining. Both share one copy of the backbone.
    """

    def __init__(
        self,
        recipe: FamilyRecipe,
        backbone: nn.Module,
        shape: TeacherShape,
        plan: Plan,
        groups: Groups,
        site: Site,
    ) -> None:
        """Builds the heads; collective over the world."""
        assert shape.heads is not None, "heads to fit have shapes"
        self.recipe = recipe
        self.scene = Scene(
            recipe,
            plan,
            groups,
            site,
            grid_of(shape.spec, recipe.crops.global_.size),
            _say_nothing,
        )
        backbone.requires_grad_(False).eval()
        heads, copies = (
            build_heads(*shape.heads, seeded(recipe.seed, HEADS_PHASE)) for _ in range(2)
        )
        trainee = build_trainee(
            self.scene,
            HEADS_PHASE,
            (backbone, *heads),
            # nothing else has a mask token
            traits_of(recipe, masks_input=isinstance(backbone, ViT)),
        )
        self.engine = build_engine(self.scene, HEADS_PHASE, trainee)
        self.ema = freeze(recipe, site.device, backbone, copies)

    def phase(self) -> Phase:
        """The phase that fits the heads."""
        fit, objective = self.recipe.teacher.fit, self.recipe.objective
        lr = LrSpec(peak=fit.lr, end=0.0, warmup=fit.warmup, decay="cosine")
        weights = ObjectiveSpec(
            dino=objective.dino, ibot=objective.ibot, koleo=0.0, local=objective.local
        )
        rates = step_rates(self.recipe.schedule, lr, lambda _: fit.ema, fit.steps)
        placement, parts = self.scene.placement(HEADS_PHASE), self.scene.parts_of(HEADS_PHASE)
        targets = _own_targets(self.ema)
        pupil = Pupil(HEADS_PHASE, placement, self.engine, rates, targets, parts=parts)
        return build_phase(
            self.scene,
            HEADS_PHASE,
            (0, fit.steps),
            self.ema,
            (pupil,),
            objective_of(weights),
            lambda _: self.engine.copy_ema_to(self.ema),
        )

    def heads(self) -> dict[str, torch.Tensor]:
        """The EMA of both heads by name, fp32. Collective over the world."""
        return self.engine.full("ema")
