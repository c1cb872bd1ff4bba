"""This machine as a device of a plan: its GPUs by their name, its CPU by a matrix product that is timed. Imports no torch."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distill.engine.compile_choice import compiling
from distill.plan.flops import DEFAULT_DEVICE, DEVICES, Device
from distill.recipe.keys import Recipe

THIS_CPU = "this CPU"
DEVICES_FOLDER = Path("/dev")  # has nvidia0, nvidia1, ... where GPUs are handed to this process
MODELS_FOLDER = Path("/proc/driver/nvidia/gpus")
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
SIDE, LEAST_S = 1024, 0.1  # of the matrix whose product is timed, and for how long
# Part of the timed rate that training reached: 0.40 and 0.64 in docs/bench/saving_2ranks.json and bench_cpu_2ranks.json
CPU_EFFICIENCY = 0.5
RATE = "device_tflops_per_s"


def has_gpu_here() -> bool:
    """Whether GPUs are handed to this process, by its device files and ``CUDA_VISIBLE_DEVICES``."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return not is_hidden and any(DEVICES_FOLDER.glob("nvidia[0-9]*"))


def device_here(wanted: str, num_ranks: int) -> Device:
    """The device that each rank has where a recipe is trained on this machine.

    Args:
        wanted: the recipe's ``engine.device``.
        num_ranks: ranks of this machine, which share its CPU.

    Returns:
        a GPU by its name, with the rates of a known one; ``THIS_CPU`` with a part of the rate that is
        timed now and of the memory; the usual GPU where the recipe wants one and there is none.
    """
    if wanted != "cpu" and has_gpu_here():
        return _gpu_here()
    if wanted == "cuda":
        return DEFAULT_DEVICE
    return Device(THIS_CPU, _cpu_rate() / num_ranks, _memory_gib() / num_ranks, CPU_EFFICIENCY)


def why_not_compiled(recipes: Sequence[Recipe | None]) -> list[str]:
    """A line where recipes compile less on this machine than one might expect.

    Raises:
        SetupError: one wants to compile, and this machine cannot.
    """
    engines = [recipe.engine for recipe in recipes if recipe is not None]
    lines = []
    for engine in engines:
        device_type = "cuda" if engine.device != "cpu" and has_gpu_here() else "cpu"
        lines.append(compiling(engine.compile, device_type, engine.zero).why_not)
    return [line for line in dict.fromkeys(lines) if line]


def estimate_basis(device: Device) -> str:
    """What the seconds of a plan rest on, in words."""
    if device.costs is not None:
        return f"seconds per image measured: {device.costs.source}"
    source = "a product timed now" if device.name == THIS_CPU else "its data sheet"
    return f"an estimate: {device.name} at {device.efficiency:.0%} of {device.tflops_per_s:.3g} TFLOP/s a rank, {source}"


def timed_on(facts: Mapping[str, Any], device: Device) -> dict[str, Any]:
    """Returns the JSON of a plan that was made for ``DEFAULT_DEVICE``, with the seconds of another device and its name."""
    return _timed(facts, device.name, device.tflops_per_s * device.efficiency)


def timed_as(facts: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The same, for the device of an earlier ``plan.json``."""
    if not before.get(RATE):
        return dict(facts)
    return _timed(facts, str(before["device"]), float(before[RATE]))


def _timed(facts: Mapping[str, Any], name: str, tflops_per_s: float) -> dict[str, Any]:
    factor = DEFAULT_DEVICE.tflops_per_s * DEFAULT_DEVICE.efficiency / tflops_per_s
    times: dict[str, Any] = {key: facts[key] * factor for key in ("step_s", "days") if key in facts}
    times["images_per_s"] = facts["images_per_s"] / factor
    if "image_s" in facts:
        times["teach_s"] = facts["teach_s"] * factor
        times["image_s"] = {name: value * factor for name, value in facts["image_s"].items()}
    return {**facts, **times, "device": name, RATE: tflops_per_s}


def _gpu_here() -> Device:
    """The first GPU: a known one by its name, else the usual one under this one's name."""
    texts = [path.read_text() for path in sorted(MODELS_FOLDER.glob("*/information"))]
    found = re.search(r"Model:\s*(.+)", texts[0]) if texts else None
    model = found[1].strip() if found else "a GPU"
    spelled = model.lower().replace(" ", "")  # "RTX 4090" is rtx4090
    known = next(
        (each for name, each in DEVICES.items() if name in spelled and "laptop" not in spelled),
        None,
    )
    if known is None:
        return replace(DEFAULT_DEVICE, name=f"{model}, taken for an {DEFAULT_DEVICE.name}")
    size = re.search(r"(\d+)\s*GB", model)
    return replace(known, memory_gib=float(size[1])) if size else known


def _cpu_rate() -> float:
    """TFLOP/s of a product of fp32 matrices on all cores, timed now."""
    matrix = np.random.default_rng(0).random((SIDE, SIDE), np.float32)
    matrix @ matrix  # the first call starts threads
    started, shortest = time.perf_counter(), float("inf")
    while time.perf_counter() - started < LEAST_S:
        before = time.perf_counter()
        matrix @ matrix
        shortest = min(
            shortest, time.perf_counter() - before
        )  # other work on the cores takes longer
    return 2.0 * SIDE**3 / shortest / 1e12


def _memory_gib() -> float:
    """Memory of this machine, or of its container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.is_file() else "max"
    return min(total, int(limit) if limit.isdecimal() else total) / 2**30
