"""A run that goes on from a checkpoint, on as many ranks and on others, beside the run that never stopped.

    2 ranks  step 0 -> 10 (checkpoint, look-ahead in flight) -> the end     the run that never stopped
    n ranks           10 -> the end, from a copy of that checkpoint         for each n

The students' layer scales begin at 1: at 1e-5 the class tokens of all images are nearly the same, and
KoLeo, the logarithm of their distances, shows the rounding of fp32 and nothing else.

On 2 ranks every loss and every final weight must be equal, bit for bit. On others the samples must
stand in the same places, and each loss be within 1e-6, relative.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

FIRST, SAME = 10, 2  # the step resumed from, and the ranks that it was saved on
WITHIN = 1e-6  # relative, of each loss in fp32
RECIPE = """\
name: tiny
teacher: {weights: FOLDER/teacher}
students:
  - {name: plain, arch: vit, width: 16, depth: 1, heads: 2, patch: 8, layerscale: 1.0, head_widths: {dino_hidden: 16, ibot_hidden: 16}}
  - {name: gated, arch: vit, width: 24, depth: 2, heads: 2, patch: 8, layerscale: 1.0, ffn: swiglu, head_widths: {dino_hidden: 16, ibot_hidden: 16}}
  - {name: conv, arch: convnext, depths: [1, 1, 1], widths: [8, 12, 16], head_widths: {dino_hidden: 16, ibot_hidden: 16}}
data: {sources: [FOLDER/images]}
crops: {global: {size: 32}, local: {count: 2, size: 16}, flip: 0.5}
schedule: {batch: 24, steps: STEPS, lr: {peak: 2.0e-4, warmup: 5}}
engine: {device: cpu, precision: fp32, lookahead: 2}
checkpoint: {every: 10, keep: 100}
"""


@dataclass(frozen=True)
class Trace:
    """What a run did: the loss of each student at each step, the sample at each place, the weights it ended with."""

    losses: dict[tuple[str, int], float]
    samples: dict[tuple[int, int], int]
    weights: dict[str, dict[str, Tensor]]


def run(arguments: list[str]) -> bool:
    """Resumes on each of ``--layouts`` and compares ``--steps`` steps."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos resume")
    parser.add_argument("--layouts", default="1,2,3,4")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "overrides", nargs="*", help="of the recipe, as in students.0.layerscale=1e-5"
    )
    options = parser.parse_args(arguments)
    overrides = tuple(options.overrides)
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_inputs(folder, FIRST + options.steps)
        whole = train(folder, "whole", SAME, overrides)
        saved = folder / "runs" / "whole" / "checkpoints" / f"family-{FIRST:07d}"
        print(f"resume: {options.steps} steps after step {FIRST}, saved on {SAME} ranks")
        for num_ranks in map(int, options.layouts.split(",")):
            name = f"on{num_ranks}"
            shutil.copytree(saved, folder / "copies" / name / "checkpoints" / saved.name)
            trace = train(folder, name, num_ranks, overrides)
            failed = not report(num_ranks, whole, trace, options.steps) or failed
    return failed


def report(num_ranks: int, whole: Trace, trace: Trace, num_steps: int) -> bool:
    """Prints how far a resumed run is from the one that never stopped; True when it is as promised."""
    expected = {key: loss for key, loss in whole.losses.items() if key[1] >= FIRST}
    is_complete = trace.losses.keys() == expected.keys() and len(expected) == 3 * num_steps
    places = {key: image for key, image in whole.samples.items() if key[0] >= FIRST}
    same_samples = trace.samples == places
    shared = trace.losses.keys() & expected.keys()
    worst = max(abs(trace.losses[key] / expected[key] - 1.0) for key in shared)
    equal_weights = all(
        torch.equal(tensor, trace.weights[name][key])
        for name, weights in whole.weights.items()
        for key, tensor in weights.items()
    )
    holds = is_complete and same_samples
    holds &= (worst == 0.0 and equal_weights) if num_ranks == SAME else worst <= WITHIN
    print(
        f"  {num_ranks} ranks: {len(shared)} losses, worst {worst:.1e} off; "
        f"samples {'the same' if same_samples else 'DIFFER'}; "
        f"final weights {'bit-equal' if equal_weights else 'not bit-equal'}; "
        f"{'holds' if holds else 'BROKEN'}"
    )
    return holds


def train(folder: Path, name: str, num_ranks: int, overrides: tuple[str, ...]) -> Trace:
    """Runs the job of that name to its end on some ranks, from whatever checkpoint it has."""
    from distill.engine.local_ranks import LocalRanks
    from distill.job.prepare import JobRequest, prepare

    run_folder, notes = folder / "runs" / name, folder / "notes" / name
    request = JobRequest(str(folder / "recipe.yaml"), overrides, str(run_folder), "")
    prepare(request, num_ranks=num_ranks, fresh=True, say=lambda _: None)
    copy = folder / "copies" / name / "checkpoints"
    if copy.exists():
        shutil.copytree(copy, run_folder / "checkpoints")
    notes.mkdir(parents=True)
    with LocalRanks("spawn", num_ranks, folder / "logs" / name) as ranks:
        ranks.start(work_and_note, str(run_folder), str(notes))
        while ranks.are_running:
            ranks.wait(1.0)
        assert set(ranks.exit_codes.values()) == {0}, f"{ranks.exit_codes}; see {ranks.logs}"
    return read_trace(run_folder, notes)


def work_and_note(run_folder: str, notes: str, store: str) -> None:
    """One rank of the product, which notes every loss and every sample on the way."""
    from distill.data.sampler import Sampler
    from distill.engine.engine import Engine
    from distill.launch.rank import entry
    from distill.train.student import StudentTrainer

    train_step, step_engine, draw = (
        StudentTrainer.train_step,
        Engine.backward_and_step,
        Sampler.draw,
    )
    losses: dict[str, float] = defaultdict(float)
    samples: dict[str, int] = {}
    now = [""]

    def noted_train_step(self: Any, batch: Any, numbers: Any) -> Any:
        now[0] = f"{self.name}/{numbers.run_step}"
        return train_step(self, batch, numbers)

    def noted_step(self: Any, loss: Tensor, *rest: Any, **named: Any) -> Any:
        losses[now[0]] += float(loss.detach())
        return step_engine(self, loss, *rest, **named)

    def noted_draw(self: Any, step: int, positions: Any) -> Any:
        drawn = draw(self, step, positions)
        for position, image in zip(positions.tolist(), drawn[0].tolist(), strict=True):
            samples[f"{step}/{position}"] = image
        return drawn

    cores = sorted(os.sched_getaffinity(0))  # one each: then all layouts compute with one thread
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    StudentTrainer.train_step, Engine.backward_and_step = noted_train_step, noted_step  # type: ignore[method-assign]
    Sampler.draw = noted_draw  # type: ignore[method-assign]
    entry(run_folder, None, store)
    told = json.dumps({"losses": losses, "samples": samples})
    (Path(notes) / f"{os.environ['RANK']}.json").write_text(told)


def read_trace(run_folder: Path, notes: Path) -> Trace:
    """All ranks' notes: a loss is the mean over the ranks that trained the student."""
    parts: dict[tuple[str, int], list[float]] = defaultdict(list)
    samples: dict[tuple[int, int], int] = {}
    for path in sorted(notes.iterdir()):
        told = json.loads(path.read_text())
        for key, loss in told["losses"].items():
            name, _, step = key.partition("/")
            parts[name, int(step)].append(loss)
        for key, image in told["samples"].items():
            step, _, position = key.partition("/")
            before = samples.setdefault((int(step), int(position)), image)
            assert before == image, f"two ranks draw different samples for {key}"
    losses = {key: sum(each) / len(each) for key, each in parts.items()}
    weights = {
        path.parent.name: load_file(path)
        for path in sorted((run_folder / "students").glob("*/model.safetensors"))
    }
    return Trace(losses, samples, weights)


def write_inputs(folder: Path, num_steps: int) -> None:
    """Images, a teacher with heads, and a recipe for three students."""
    from distill.export.save import ExportFacts, write_backbone, write_heads
    from teacher.heads import Head, init_head_
    from teacher.shapes import HeadShape, ViTSpec

    draw = np.random.default_rng(0)
    for name in ("one", "two"):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(20):
            pixels = draw.integers(0, 256, (6, 6, 3), np.uint8)
            picture = Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC)
            picture.save(folder / "images" / name / f"{number}.png")
    spec = ViTSpec(16, 2, 2, 64, 8, "mlp", layerscale_init=1.0)
    generator = torch.Generator().manual_seed(3)
    backbone = spec.build()
    spec.init_(backbone, generator)
    heads = {name: Head(HeadShape(16, 16, 8, 16)) for name in ("dino_head", "ibot_head")}
    for head in heads.values():
        init_head_(head, generator)
    half = (0.5, 0.5, 0.5)
    facts = ExportFacts(32, half, half, {"recipe": "tiny"})
    write_backbone(folder / "teacher", backbone.state_dict(), spec, facts)
    named = {f"{n}.{k}": v for n, head in heads.items() for k, v in head.state_dict().items()}
    write_heads(folder / "teacher" / "heads.safetensors", named)
    text = RECIPE.replace("FOLDER", str(folder)).replace("STEPS", str(num_steps))
    (folder / "recipe.yaml").write_text(text)
