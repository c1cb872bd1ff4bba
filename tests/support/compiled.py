"""Compiled parts beside the same as written, in a process without the shape checks of the suite, which the compiler would trace.

python -m tests.support.compiled graphs                          every architecture of the catalogue, small, and custom students
python -m tests.support.compiled steps BACKEND PRECISION ZERO    four steps of a task on one rank, in two micro-batches
python -m tests.support.compiled sharded                         a teacher of which two ranks hold a part each
python -m tests.support.compiled chunks BACKEND                  Sinkhorn and cross-entropy at sizes that divide nothing

Prints JSON: largest differences, relative to the largest value, and what torch counted.
"""

import copy
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.utils as dynamo
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from distill.engine.compiled import allow_shapes, compile_parts, compiled_steps
from distill.engine.config import EngineSettings
from distill.engine.engine import Engine, StepRates, prepare_deepspeed
from distill.train.student import SinkhornTargets
from students.custom import probe
from students.shapes import CATALOG, ConvNeXtSpec
from students.student import build_backbone, seeded
from teacher.batch import PatchMasks
from teacher.chunks import AS_WRITTEN, sinkhorn
from teacher.heads import cross_entropy
from teacher.losses import Objective
from teacher.shapes import ViTSpec
from teacher.task import DistillationTask, StepScalars, TaskOptions
from tests.support import tiny

HERE = "tests.support.compiled"
Facts = dict[str, Any]
STEPS = 4


class Plain(nn.Module):
    """A custom student of one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.stride = 8, 8
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.last(torch.relu(self.stem(image)))
        return patches.mean(dim=(2, 3)), patches


class Branching(Plain):
    """A custom student whose way depends on a value: no graph has that."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        if float(image.detach().sum()) > 1e9:
            image = image / 2
        return super().forward(image)


class Normed(Plain):
    """A custom student with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))  # type: ignore[assignment]


def small(name: str) -> Any:
    """An architecture of the catalogue with two blocks."""
    spec = CATALOG[name]
    if isinstance(spec, ConvNeXtSpec):
        return replace(spec, depths=(1, 2, 1, 1), widths=(8, 12, 16, 24), layerscale_init=0.5)
    assert isinstance(spec, ViTSpec)
    return replace(spec, width=32, depth=2, heads=2, ffn_width=48, layerscale_init=0.5)


def graphs() -> Facts:
    """Each network on two sizes of crops: graphs, breaks, differences of features and gradients, reasons."""
    found = {name: _beside(small(name)) for name in CATALOG}
    for kind in ("Plain", "Branching", "Normed"):
        found[kind] = _beside(probe(f"{HERE}:{kind}", "{}"))
    return found


def _beside(spec: Any) -> Facts:
    torch._dynamo.reset()
    dynamo.counters.clear()
    written = build_backbone(spec, seeded(0, "network"))
    compiled = copy.deepcopy(written)
    lines = compile_parts(compiled, "aot_eager")
    before = dynamo.counters["stats"]["unique_graphs"]  # of the probe
    features, gradients = [], []
    for size in (64, 32):
        pixels = torch.randn(2, 3, size, size)
        outputs = [network(pixels) for network in (written, compiled)]
        for output in outputs:
            (output.class_token.sum() + output.patch_tokens.square().sum()).backward()
        features.append(_apart(outputs[0].patch_tokens, outputs[1].patch_tokens))
    for one, other in zip(written.parameters(), compiled.parameters(), strict=True):
        if one.grad is not None:
            gradients.append(_apart(one.grad, other.grad))
    return {
        "graphs": dynamo.counters["stats"]["unique_graphs"] - before,
        "breaks": sum(dynamo.counters["graph_break"].values()),
        "features": max(features),
        "gradients": max(gradients),
        "names": written.state_dict().keys() == compiled.state_dict().keys(),
        "lines": lines,
    }


def steps(backend: str, precision: str, zero: int) -> Facts:
    """The losses of some steps and what the weights are after them, compiled and as written."""
    with _one_rank():
        runs = [_train(name, precision, zero) for name in ("", backend)]
    (losses, norms, weights, start), (others, other_norms, other_weights, _) = runs
    moved = max(_apart(weights[name], tensor) for name, tensor in start.items())
    return {
        "losses": max(abs(a - b) / abs(a) for a, b in zip(losses, others, strict=True)),
        "norms": max(abs(a - b) / abs(a) for a, b in zip(norms, other_norms, strict=True)),
        "weights": max(_apart(weights[name], other_weights[name]) for name in weights),
        "moved": moved,
    }


def _train(backend: str, precision: str, zero: int) -> Any:
    """Trains a task for some steps, compiled where a backend is named."""
    taught = tiny.teacher().to(dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    group, alone = dist.group.WORLD, dist.new_group([0])
    options = TaskOptions(masks_input=False, mean=tiny.MEAN, std=tiny.STD)
    task = DistillationTask(*tiny.network(3), options, None, 1, koleo_is_local=True)  # type: ignore[arg-type]
    if backend:
        for network in (taught, task):
            assert not compile_parts(network, backend)
    images = 16
    settings = EngineSettings(zero, precision, 3.0, images // 2, num_parts=2)
    engine = Engine(task, group, alone, settings)  # type: ignore[arg-type]
    start = engine.full("weight")
    batch = tiny.student_batch(taught, images)
    assert taught.dino_head is not None and taught.ibot_head is not None
    builder = SinkhornTargets(taught.dino_head, taught.ibot_head)
    scalars = StepScalars(Objective(1.0, 1.0, 0.1, 1.0), 1.0, 1.0)
    losses, norms = [], []
    for step in range(STEPS):
        targets = builder.build_targets(batch, 0.07 - 0.005 * step, None)
        total = 0.0
        for part in (slice(0, 8), slice(8, 16)):
            cut = targets.part(part, batch.masks.masked(part))
            found = engine.forward(batch.part(part), cut, scalars)
            engine.backward_and_step(found.total, StepRates(1e-3, 1e-3, 0.04, 0.9))
            total += float(found.total.detach())
        losses.append(total)
        norms.append(float(engine.grad_norm))
    return losses, norms, engine.full("weight"), start


@contextmanager
def _one_rank() -> Iterator[None]:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        prepare_deepspeed("cpu")
        try:
            yield
        finally:
            dist.destroy_process_group()


def sharded() -> Facts:
    """Whether targets are the same bits on each of two ranks, which have other numbers of images."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_teach_in_parts, (folder,), nprocs=2)
        return {path.name: path.read_text() for path in Path(folder).glob("rank-*")}


def _teach_in_parts(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    group, images, targets = dist.group.WORLD, (4, 3)[rank], []
    assert group is not None
    for is_compiled in (False, True):
        teacher = tiny.teacher()
        if is_compiled:
            assert not compile_parts(teacher, "aot_eager")
        teacher.shard(group, torch.device("cpu"))
        teacher.pad_forwards(4)
        targets.append(teacher.teach(tiny.crops(images), PatchMasks.of(tiny.masks(images))))
    one, other = targets
    is_equal = torch.equal(one.class_features, other.class_features)
    is_equal &= torch.equal(one.patch_features, other.patch_features)
    graphs_made = dynamo.counters["stats"]["unique_graphs"]
    (Path(folder) / f"rank-{rank}").write_text(f"{is_equal}, {graphs_made} graphs")
    dist.destroy_process_group()


def chunks(backend: str) -> Facts:
    """Sinkhorn of 300 rows to 37 prototypes at two temperatures, and the cross-entropy of 19 rows to their targets."""
    allow_shapes()
    results = []
    for made in (AS_WRITTEN, compiled_steps(backend)):
        draw = torch.Generator().manual_seed(1)
        rows = nn.functional.normalize(torch.randn(300, 6, generator=draw), dim=1)
        prototypes = torch.randn(37, 6, generator=draw)
        student = torch.randn(3, 19, 6, generator=draw).requires_grad_()
        weight = torch.randn(37, 6, generator=draw).requires_grad_()
        mixture, weights = torch.rand(3, 2, generator=draw), torch.rand(19, generator=draw)
        found = []
        for temperature in (0.07, 0.04):
            full = sinkhorn(rows, prototypes, temperature, None, made)
            loss = cross_entropy(student, weight, full.part(slice(0, 38)), mixture, weights, made)
            loss.backward()
            found += [full.log_rows, full.log_columns, loss.detach()]
        none = cross_entropy(student[:, :0], weight, full.part(slice(0, 0)), mixture, weights[:0])
        assert float(none.detach()) == 0.0
        results.append([*found, student.grad, weight.grad])
    graphs_made = dynamo.counters["stats"]["unique_graphs"]
    return {"apart": max(map(_apart, *results)), "graphs": graphs_made}


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference by the largest value."""
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["graphs"]:
            facts = graphs()
        case ["steps", backend_name, precision_name, stage]:
            facts = steps(backend_name, precision_name, int(stage))
        case ["sharded"]:
            facts = sharded()
        case ["chunks", backend_name]:
            facts = chunks(backend_name)
        case _:
            raise SystemExit(__doc__)
    sys.stdout.write(json.dumps(facts))
