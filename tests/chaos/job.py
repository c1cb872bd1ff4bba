"""A tiny real job for faults: two stages of a teacher, then three students, on gloo processes; and how to start it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.test_journeys import FAMILY, TEACHER, write_images

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


def start(recipe: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    """The job in a process group of its own, its words on a pipe."""
    command = [sys.executable, "-m", "distill", "train", str(recipe), "--out", str(out), *words]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def status_of(run: Path) -> dict[str, Any]:
    """The run's status, empty while there is none."""
    path = run / "status.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def wait_for_step(
    process: subprocess.Popen[str], run: Path, phase: str, step: int, wait_s: float = 120.0
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
    """Process ids of the ranks that a launcher started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            words = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == launcher and b"spawn_main" in words:
            found.append(int(path.parent.name))
    return sorted(found)


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
