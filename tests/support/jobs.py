"""A tiny real job for faults: two stages of a teacher, then three students, on gloo processes; and how to start it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
RUN = "tiny"


def write_recipes(folder: Path, *, stage_steps: int, steps: int, save_every: int) -> Path:
    """The recipes and their images; the family's path."""
    data = write_images(folder / "images")
    saved = f"checkpoint: {{every: {save_every}}}"
    for name, text in (("teacher", TEACHER), ("family", FAMILY)):
        text = text.replace("DATA", str(data)).replace("checkpoint: {every: 1000}", saved)
        text = text.replace("base, steps: 20", f"base, steps: {stage_steps}")
        text = text.replace("STEPS", str(steps))
        (folder / f"{name}.yaml").write_text(text)
    return folder / "family.yaml"


def start(
    recipe: Path, out: Path, *words: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """The job in a process group of its own, its words on a pipe; ``environment``: variables beside the usual."""
    command = [sys.executable, "-m", "distill", "train", str(recipe), "--out", str(out), *words]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, **(environment or {})},
        start_new_session=True,
    )


def status_of(run: Path) -> dict[str, Any]:
    """The run's status, empty while there is none."""
    path = run / "status.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def wait_for_step(
    process: subprocess.Popen[str], run: Path, phase: str, step: int, wait_s: float = 300.0
) -> None:
    """Returns when the running job has finished ``step`` steps of a phase."""
    deadline = time.monotonic() + wait_s
    while True:
        status = status_of(run)
        if status.get("phase") == phase and status["step"] >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{phase} step {step} was not reached"
        time.sleep(0.05)


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks that a launcher started, by itself or through its fork server."""
    forked = [pid for server in servers_of(launcher) for pid in _children(server, b"forkserver")]
    return sorted([*_children(launcher, b"spawn_main"), *forked])


def servers_of(launcher: int) -> list[int]:
    """Process ids of the fork server that a launcher started: one, or none on a GPU."""
    return _children(launcher, b"forkserver")


def _children(parent: int, word: bytes) -> list[int]:
    """Children of a process that have a word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            words = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and word in words:
            found.append(int(path.parent.name))
    return found


def session_of(leader: int) -> list[int]:
    """Process ids of a session that still run: all that a job in a session of its own has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


def is_running(pid: int) -> bool:
    """The process is there and not merely waiting to be buried."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def left_after(pids: list[int], wait_s: float) -> list[int]:
    """Those of the processes that still run after a while."""
    deadline = time.monotonic() + wait_s
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [pid for pid in pids if is_running(pid)]


def weights_of(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The finished students by name."""
    return {
        path.name: load_file(path / "model.safetensors")
        for path in sorted((run / "students").iterdir())
    }


def differing(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not the same bits in two finished runs."""
    mine, theirs = weights_of(one), weights_of(other)
    if mine.keys() != theirs.keys():
        return [f"students {sorted(mine)} and {sorted(theirs)}"]
    return [
        f"{name}/{key}"
        for name, weights in mine.items()
        for key, tensor in weights.items()
        if not torch.equal(tensor, theirs[name][key])
    ]


TEACHER = """\
name: tiny-teacher
model: {arch: vit, width: 16, depth: 1, heads: 2, patch: 8, untie_local_norm: true}
heads:
  dino: {hidden: 16, bottleneck: 8, prototypes: 16}
  ibot: {hidden: 16, bottleneck: 8, prototypes: 16}
data: {sources: [{path: "DATA"}]}
crops: {global: {size: 32}, local: {count: 2, size: 16}, flip: 0.5}
schedule: {batch: 16, lr: {peak: 1.0e-3}, rope_rescale: [0.5, 2.0], drop_path: 0.2, layer_decay: 0.9}
stages:
  - {name: base, steps: 20}
  - name: gram
    steps: 10
    batch: 8
    gram: {teacher: base@10, refresh: 5, max_refreshes: 1, resolution: 1.5}
    crops: [{global: 32, local: 16, ratio: 0.5}, {global: 48, local: 24, ratio: 0.5}]
engine: {device: cpu, processes: 2, precision: fp32}
checkpoint: {every: 1000}
"""


FAMILY = """\
name: tiny
teacher: {train: teacher.yaml}
students:
  - {name: plain, arch: vit, width: 16, depth: 1, heads: 2, patch: 8, head_widths: {dino_hidden: 16, ibot_hidden: 16}}
  - {name: gated, arch: vit, width: 16, depth: 1, heads: 2, patch: 8, ffn: swiglu, head_widths: {dino_hidden: 16, ibot_hidden: 16}}
  - {name: conv, arch: convnext, depths: [1, 1, 1], widths: [8, 12, 16], head_widths: {dino_hidden: 16, ibot_hidden: 16}}
data: {sources: [{path: "DATA"}]}
crops: {global: {size: 32}, local: {count: 2, size: 16}, flip: 0.5}
schedule: {batch: 16, steps: STEPS, lr: {peak: 1.0e-3, warmup: 2, decay: cosine}}
engine: {device: cpu, processes: 2, precision: fp32}
checkpoint: {every: 1000}
"""


def write_images(folder: Path) -> Path:
    """Two classes of 64 px pictures that differ in the direction of their stripes."""
    draw = np.random.default_rng(0)
    for name in ("across", "along"):
        (folder / name).mkdir(parents=True)
        for i in range(15):
            stripes = (
                np.sin(np.arange(64) * draw.uniform(0.3, 0.6))[:, None] * np.ones((64, 64)) * 80
                + 128
            )
            pixels = (stripes if name == "across" else stripes.T)[..., None] + draw.normal(
                0, 20, (64, 64, 3)
            )
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def run_distill(*words: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distill", *words],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=ENVIRONMENT,
    )


def students_of(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {
        path.name: load_file(path / "model.safetensors")
        for path in sorted((run / "students").iterdir())
    }


def run_and_interrupt(words: list[str], status: Path, phase: str) -> None:
    """Starts a job and stops it by Ctrl-C once it is in ``phase``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distill", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 120
    while not is_in(status, phase):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    state = json.loads(status.read_text())["state"]
    if process.returncode == 0:
        assert state == "finished"  # the signal came after the last step
    else:
        assert process.returncode == 130 and state == "stopped", output
        assert "distill train " in output


def assert_equal_students(one: Path, other: Path) -> None:
    assert set(students_of(one)) == set(students_of(other))
    for name, weights in students_of(one).items():
        for key, tensor in students_of(other)[name].items():
            assert torch.equal(weights[key], tensor), f"{name} {key}"


def without_heads(finished: Path, mode: str) -> list[str]:
    """Overrides for a released teacher: weights, no heads."""
    heads = "{hidden: 16, bottleneck: 8, prototypes: 16}"
    fit = f"{{steps: 20, lr: 1.0e-3, warmup: 2, heads: {{dino: {heads}, ibot: {heads}}}}}"
    return [
        f"teacher={{weights: {finished / 'teacher'}, heads: {mode}, fit: {fit}}}",
        "schedule.steps=10",
    ]


def is_in(path: Path, phase: str) -> bool:
    return path.is_file() and json.loads(path.read_text())["phase"] == phase


TINY = """\
name: tiny
teacher: {arch: vits16, weights: /nowhere, fit: {heads: HEADS}}
students:
  - {name: one, arch: vit, width: 32, depth: 2, heads: 2, patch: 16, head_widths: {dino_hidden: 16, ibot_hidden: 16}}
  - {name: two, arch: vit, width: 16, depth: 1, heads: 2, patch: 16, head_widths: {dino_hidden: 16, ibot_hidden: 16}}
data: {sources: [{path: /nowhere}]}
crops: {global: {size: 64}, local: {count: 2, size: 32}}
schedule: {batch: 8, steps: 10, lr: {peak: 1.0e-3}}
engine: {device: cpu, processes: 2, precision: fp32, teacher_micro_batch: 1}
"""


HEADS = "{dino: {hidden: 16, bottleneck: 8, prototypes: 16}, ibot: {hidden: 16, bottleneck: 8, prototypes: 16}}"
