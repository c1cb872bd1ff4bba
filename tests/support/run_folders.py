"""Run folders without a run: what a family of two students leaves, made in a moment."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from distill.runfolder.events import Event, note
from distill.runfolder.metrics import MetricsWriter
from distill.runfolder.status import NetworkStatus, RunState, StatusFile, write_json
from tests.support.status import PHASES, ROW, STATUS

RECIPE = """\
name: NAME
students:
  - {name: small, arch: vits16, lr: 2.0e-4}
  - {name: tiny, arch: vit, width: 16}
schedule: {batch: 32, steps: 200, lr: {peak: PEAK}}
"""
PLAN = {
    "images_global": 32,
    "num_ranks": 3,
    "placements": {"small": [0, 2], "tiny": [2, 3]},
    "slices": {"small": [[2, 16]], "tiny": [[1, 32]]},
    "shares": [[2, 8.0], [1, 16.0]],
    "utilisation": 0.9,
    "step_s": 0.25,
    "images_per_s": 128.0,
    "teach_s": 0.01,
    "image_s": {"small": 0.01, "tiny": 0.002},
    "notes": [],
    "device": "this CPU",
}
SUMMARY = {
    "images": {"train": 1000, "held_out": 60, "without_label": 2, "remarks": ["two classes"]},
    "teacher": {"knn": 0.9},
    "students": {
        "small": {"loss": 5.5, "parked": None, "steps": 200, "knn": 0.81},
        "tiny": {"loss": 6.5, "parked": None, "steps": 200, "knn": 0.71},
    },
    "baselines": {"pixels": 0.31, "colour": 0.21, "untrained": {"teacher": 0.4, "small": 0.35}},
}


def scored_row(
    student: str, step: int, value: float = 0.5, knn: float | None = None
) -> dict[str, Any]:
    """A row of the scores of a student over the run."""
    near = {"mutual_knn": value, "cka": value / 2, "cosine": 0.0, "effective_rank": 3.0}
    patch = {**near, "mutual_knn": value / 4}
    return {"student": student, "step": step, "knn": knn, "class_token": near, "patch": patch}


def write_run(
    folder: Path, *, state: RunState = "finished", peak: str = "1.0e-3", picture: bool = True
) -> Path:
    """A run folder of a family whose teacher was trained in two stages; without a summary where it is not finished."""
    folder.mkdir(parents=True)
    request = {"resume_command": f"distill train {Path.cwd()}/my.yaml", "overrides": []}
    write_json(folder / "job.json", {"request": request, "data_fingerprint": "0123"})
    recipe = RECIPE.replace("NAME", folder.name).replace("PEAK", peak)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "recipe.resolved.yaml").write_text(recipe)
    write_json(folder / "plan.json", PLAN)
    write_json(folder / "timing.json", {"family": {"s": 61.0, "images": 6400}})
    write_json(folder / "env.json", {"python": "3.11", "packages": {"torch": "2.13.0"}})
    ended = {"small": NetworkStatus((0, 1), "done"), "tiny": NetworkStatus((2,), "done", skipped=1)}
    status = replace(STATUS, state=state, networks=ended if state == "finished" else {})
    StatusFile(folder).write(status)
    for phase in PHASES:
        for index, name in enumerate(phase.networks):
            with MetricsWriter(folder, name) as writer:
                for step in range(10, phase.steps + 1, 10):
                    row = replace(ROW, phase=phase.name, step=step, loss=9.0 - step / 100 + index)
                    writer.write(row)
    note(folder, Event("skipped", "small: step 30 skipped, its loss is nan", "small", 30))
    if state == "finished":
        write_json(folder / "summary.json", SUMMARY)
    for name in ("small", "tiny"):
        student = folder / "students" / name
        student.mkdir(parents=True)
        save_file(
            {"weight": torch.zeros(100, 64 if name == "small" else 16)},
            student / "model.safetensors",
        )
    if picture:
        write_picture(folder / "features.png")
    return folder


def write_picture(path: Path) -> None:
    """A picture whose file holds a comment and EXIF."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 300, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x010E] = "taken by somebody"
    Image.fromarray(pixels).save(path, exif=exif)


def with_summary(folder: Path, **values: object) -> Path:
    """The folder, with more in its summary."""
    path = folder / "summary.json"
    write_json(path, {**json.loads(path.read_text()), **values})
    return folder
