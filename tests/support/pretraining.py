"""A teacher of three stages at the smallest size, on the ranks of this world."""

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from distill.data.build_index import build_index
from distill.engine.engine import prepare_deepspeed
from distill.job.build import RankContext
from distill.job.pretraining import Pretraining
from distill.plan.pretraining import plan_stage
from distill.recipe.keys import TeacherRecipe
from distill.recipe.reader import load_recipe
from distill.runfolder.heartbeat import Heartbeat
from distill.train.faults import FaultHandler
from distill.train.groups import make_groups
from distill.train.loop import run_phase
from distill.train.phase import Decision

RECIPE = """
name: small
model: {arch: vit, width: 32, depth: 2, heads: 2, patch: 8, layerscale: 0.5}
heads:
  dino: {hidden: 24, bottleneck: 8, prototypes: 16}
  ibot: {hidden: 24, bottleneck: 8, prototypes: 12}
data: {sources: [IMAGES]}
crops: {global: 32, local: {count: 2, size: 16}, flip: 0.5}
schedule:
  batch: 16
  lr: {peak: 1.0e-3, warmup: 2}
  clip: 0.5
  ema: 0.9
  teacher_temperature: {start: 0.05, end: 0.07, warmup: 4}
  freeze_prototypes: 2
  rope_rescale: [0.5, 2.0]
  drop_path: 0.3
  layer_decay: 0.8
  patch_embed_lr: 0.2
stages:
  - {name: base, steps: 4}
  - name: gram
    steps: 4
    objective: {local: 0.5}
    gram: {teacher: base@2, refresh: 2, max_refreshes: 1}
    lr: {peak: 5.0e-4}
    ema: 0.8
  - name: high-res
    steps: 4
    batch: 8
    gram: {teacher: base@3, weight: 1.5, resolution: 1.5, refresh: 100}
    lr: {peak: 4.0e-4, warmup: 4, ramp: cosine}
    crops:
      - {global: 32, local: 16, ratio: 0.5}
      - {global: 48, local: 24, ratio: 0.5}
engine: {device: cpu, precision: fp32, teacher_micro_batch: 4}
"""


NUM_IMAGES = 21


CPU = torch.device("cpu")


def write_pretraining(folder: Path) -> Path:
    """Writes the images, and beside their folder the recipe, before any rank starts: ranks that write and read one file meet half of it."""
    for i in range(NUM_IMAGES):
        coarse = np.random.default_rng(i).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((64, 48)).save(folder / f"{i:02}.png")
    (folder.parent / "pretraining.yaml").write_text(RECIPE.replace("IMAGES", str(folder)))
    return folder


def recipe_of(images: Path, *overrides: str) -> TeacherRecipe:
    recipe = load_recipe(images.parent / "pretraining.yaml", list(overrides))
    assert isinstance(recipe, TeacherRecipe)
    return recipe


@dataclass
class Witness:
    """Stands where recorder and saver stand, and writes down what it sees after every step."""

    losses: list[float] = field(default_factory=list)
    terms: list[dict[str, float]] = field(default_factory=list)
    anchors: list[dict[str, Tensor]] = field(default_factory=list)

    def report(self) -> None:
        """Nothing is saved."""

    def wait(self) -> None:
        """Nothing is saved."""

    def save(self, phase: Any, step: int, held: object) -> None:
        raise AssertionError(f"{phase.name}: nothing asked for a save at step {step}")

    def record(self, phase: Any, _: int, __: object) -> Decision:
        values = phase.trainers[0].read_metrics(wait=0.0)
        self.losses.append(values.pop("loss"))
        self.terms.append(values)
        state = phase.teacher.anchor_state()
        self.anchors.append({name: tensor.clone() for name, tensor in state.items()})
        if phase.teacher.anchor is not None:
            assert all(p.grad is None for p in phase.teacher.anchor.parameters())
        return Decision(save=False, stop=False)


def pretrain(
    images: Path, folder: Path, *overrides: str, device: torch.device = CPU
) -> dict[str, Any]:
    """All stages on the ranks of this world."""
    prepare_deepspeed("cpu")
    recipe = recipe_of(images, *overrides)
    groups = make_groups(
        plan_stage(recipe, recipe.stages[0], dist.get_world_size()), timedelta(seconds=60)
    )
    rank_context = RankContext(device, folder, build_index([images], max_bad_fraction=0.0))
    pretraining, witness = Pretraining(recipe, groups, rank_context), Witness()
    for stage in recipe.stages:
        phase = pretraining.phase(stage)
        pretraining.engine.copy_ema_to(pretraining.ema)
        fault_handler = FaultHandler(phase, folder)
        fault_handler.start(0, groups.control)
        heartbeat = Heartbeat(folder, groups.world_rank)
        run_phase(phase, witness, witness, fault_handler, heartbeat, 0)
        phase.loader.close()
    held = [p.to_local() if hasattr(p, "to_local") else p for p in pretraining.ema.parameters()]
    return {
        "losses": witness.losses,
        "terms": witness.terms,
        "anchors": witness.anchors,
        "ema": pretraining.engine.full("ema"),
        "held": sum(part.numel() for part in held),
    }


# Rates of the published order: AdamW makes a step of its rate from a gradient that is rounding only.
GENTLE = ("schedule.lr.peak=1.0e-4", "stages.1.lr.peak=5.0e-5", "stages.2.lr.peak=4.0e-5")
