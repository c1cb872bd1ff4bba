"""Clipping by the norm of the network or of each of its modules, against a loop without an engine that is written from the rules."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine.config import EngineSettings, parameter_groups
from distill.engine.engine import Engine, StepRates, prepare_deepspeed
from distill.train.student import SinkhornTargets
from teacher.batch import CropBatch, PatchMasks, StudentBatch
from teacher.losses import Objective
from teacher.task import DistillationTask, SoftAssignments, StepScalars, TaskOptions
from tests.support.spawn import on_ranks
from tests.support.tiny import LOCALS, MEAN, STD, masks, network, teacher

STEPS, IMAGES = 30, 8
LR, DECAY, BETAS, EPS = 1e-3, 0.04, (0.9, 0.99), 1e-8
LARGEST = 0.5  # every module's norm is above it at most steps
SCALARS = StepScalars(Objective(1.0, 1.0, 0.0, 1.0), 1.0, 1.0)


def new_task(group_ranks: int) -> DistillationTask:
    options = TaskOptions(masks_input=False, mean=MEAN, std=STD)
    return DistillationTask(*network(1), options, None, group_ranks, koleo_is_local=True)


def inputs(step: int) -> tuple[StudentBatch, SoftAssignments]:
    """A step's images and targets, of the full batch."""
    generator = torch.Generator().manual_seed(step)
    globals_, locals_ = (
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        for shape in ((IMAGES, 2, 3, 16, 16), (IMAGES, LOCALS, 3, 8, 8))
    )
    crops, covered, taught = CropBatch(globals_, locals_), PatchMasks.of(masks(IMAGES)), teacher()
    batch = StudentBatch(crops, covered, taught.teach(crops, covered), (2, 2), 0, IMAGES)
    assert taught.dino_head is not None and taught.ibot_head is not None
    targets = SinkhornTargets(taught.dino_head, taught.ibot_head)
    return batch, targets.build_targets(batch, 0.07, None)


def with_engine(zero: int, clip_by: str) -> list[float]:
    """The losses of an engine on the ranks of this world, each with its part of the batch."""
    prepare_deepspeed("cpu")
    world, ranks, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    assert world is not None
    alone = [dist.new_group([each]) for each in range(ranks)][rank]
    settings = EngineSettings(zero, "fp32", LARGEST, IMAGES // ranks, clip_by=clip_by)
    engine, losses = Engine(new_task(ranks), world, alone, settings), []
    here = slice(rank * IMAGES // ranks, (rank + 1) * IMAGES // ranks)
    for step in range(STEPS):
        batch, targets = inputs(step)
        mine = targets.part(here, batch.masks.masked(here))
        loss = engine.forward(batch.part(here), mine, SCALARS).total
        engine.backward_and_step(loss, StepRates(LR, LR, DECAY, 0.9))
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / ranks)
    assert float(engine.grad_norm) > LARGEST
    return losses


def without_engine(clip_by: str) -> list[float]:
    """The same of one process: clip, decay the matrices, move by Adam's quotient of moments."""
    task, losses = new_task(1), []
    named = dict(task.named_parameters())
    first, second = ({name: torch.zeros_like(p) for name, p in named.items()} for _ in range(2))
    for step in range(STEPS):
        loss = task(*inputs(step), SCALARS).total
        task.zero_grad()
        loss.backward()
        losses.append(loss.item())
        grads = {name: p.grad for name, p in named.items() if p.grad is not None}
        together = [list(grads)]
        if clip_by == "module":
            modules = ("backbone.", "dino_head.", "ibot_head.")
            together = [[name for name in grads if name.startswith(each)] for each in modules]
        for names in together:
            norm = math.sqrt(sum(float(grads[name].double().square().sum()) for name in names))
            for name in names:
                grads[name] *= min(1.0, LARGEST / (norm + 1e-6))
        with torch.no_grad():
            for name, grad in grads.items():
                adamw(named[name], grad, first[name], second[name], step, decays(name, grad))
    return losses


@pytest.mark.parametrize("decays_tokens", [False, True])
def test_parameter_groups__tokens_have_weight_decay_only_with_the_key(decays_tokens: bool) -> None:
    task = new_task(1)
    settings = EngineSettings(1, "fp32", 1.0, 1, decays_tokens=decays_tokens)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    decayed = {
        names[id(parameter)]
        for group in parameter_groups(task, settings)
        for parameter in group["params"]
        if group["is_decayed"]
    }
    tokens = {name for name in names.values() if name.endswith(("_token", "_tokens"))}
    assert len(tokens) == 3 and (tokens <= decayed) == decays_tokens
    assert all(
        decays(name, parameter)
        for name, parameter in task.named_parameters()
        if name in decayed - tokens
    )


def decays(name: str, grad: Tensor) -> bool:
    return grad.ndim > 1 and not name.endswith(("_token", "_tokens"))


def adamw(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: int, is_decayed: bool
) -> None:
    first.mul_(BETAS[0]).add_(grad, alpha=1 - BETAS[0])
    second.mul_(BETAS[1]).add_(grad.square(), alpha=1 - BETAS[1])
    unbiased = [
        moment / (1 - beta ** (step + 1))
        for moment, beta in zip((first, second), BETAS, strict=True)
    ]
    if is_decayed:
        weight.mul_(1 - LR * DECAY)
    weight.sub_(LR * unbiased[0] / (unbiased[1].sqrt() + EPS))


@pytest.mark.slow  # a world for each
@pytest.mark.parametrize(
    ("ranks", "zero", "clip_by"),
    [(1, 1, "module"), (2, 1, "module"), (2, 3, "module"), (2, 3, "network")],
)
def test_engine__clips_as_the_rules_say(ranks: int, zero: int, clip_by: str) -> None:
    expected = without_engine(clip_by)
    other = without_engine("module" if clip_by == "network" else "network")
    assert expected != pytest.approx(other, rel=1e-3)  # it matters
    assert on_ranks(ranks, with_engine, zero, clip_by)[0] == pytest.approx(expected, rel=1e-5)
