"""The same bits twice: gradients of a small ViT and a small ConvNeXt with the switches of ``engine.deterministic``, and without.

In a process of its own, since cuBLAS reads its variable when CUDA starts. Without the switches a difference
is a figure; with them it is a problem.
"""

import json
import os
import subprocess
import sys

import torch

from students.shapes import ConvNeXtSpec
from teacher.shapes import ViTSpec
from tests.gpu.clock import Figures
from tests.gpu.machine import ROOT
from tests.gpu.sizes import FULL, TINY, Sizes

TIMES = 4
TIMEOUT_S = 120


def same_bits_twice(device: torch.device, sizes: Sizes) -> Figures:
    """How many of the later steps differ from the first, by network, with the switches and without."""
    figures: Figures = {}
    for kind in ("deterministic", "usual"):
        command = [sys.executable, "-m", "tests.gpu.exact", device.type, sizes.name, kind]
        ended = subprocess.run(
            command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=TIMEOUT_S
        )
        if ended.returncode:
            last = (ended.stderr.strip().splitlines() or ["no output"])[-1]
            return {**figures, "problems": [f"{kind}: {last}"]}
        figures[kind] = json.loads(ended.stdout.splitlines()[-1])
    wrong = {name: count for name, count in figures["deterministic"].items() if count}
    if wrong:
        figures["problems"] = [
            f"{n} of {TIMES - 1} steps differ: {name}" for name, n in wrong.items()
        ]
    return figures


def count_different(device_type: str, sizes_name: str, kind: str) -> dict[str, int]:
    """Steps whose gradients are not those of the first, bit for bit, by network."""
    from distill.engine.device import take_device
    from tests.gpu.networks import build_batch, build_prototypes, build_task, scalars

    device = take_device(device_type, is_deterministic=kind == "deterministic")
    sizes = FULL if sizes_name == FULL.name else TINY
    width = sizes.operator_width
    networks = {
        "vit": ViTSpec(width, 2, width // 16, 4 * width),
        "convnext": ConvNeXtSpec((1, 1, 1, 1), (width // 8, width // 4, width // 2, width)),
    }
    batch, prototypes = build_batch(2, device, sizes), build_prototypes(device, sizes)
    different = {}
    for name, spec in networks.items():
        task, targets = build_task(spec, device, sizes), prototypes.assign(batch)
        steps = []
        for _ in range(TIMES):
            task.zero_grad()
            task(batch, targets, scalars()).total.backward()
            gradients = [p.grad.flatten() for p in task.parameters() if p.grad is not None]
            steps.append(torch.cat(gradients))
        different[name] = sum(not torch.equal(step, steps[0]) for step in steps[1:])
    return different


if __name__ == "__main__":
    sys.stdout.write(json.dumps(count_different(*sys.argv[1:])) + "\n")
