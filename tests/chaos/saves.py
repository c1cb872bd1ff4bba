"""Saves of two small networks by two ranks through the product's own saver, without training.

The ranks of a save meet in the file system only, so both can live in one process.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from distill.runfolder.manifest import LATEST, Manifest, find_latest, read_manifest
from distill.runfolder.manifest import MANIFEST as MANIFEST_FILE
from distill.runfolder.saver import CheckpointPolicy, Saver
from distill.runfolder.tensor_file import SUFFIX, read_tensors

PHASE, HASH = "family", "hash"
NETWORKS = {"small": 0, "large": 1}  # and the rank that writes each
SIZES = {"small": 40, "large": 3000}


def state_of(name: str, step: int, scale: int = 1) -> dict[str, Tensor]:
    """What a network's state is after some steps."""
    weight = torch.arange(scale * SIZES[name], dtype=torch.float32) + step
    return {"weight/a": weight, "ema/a": weight / 2, "step": torch.tensor([float(step)])}


@dataclass(frozen=True)
class StudentTrainer:
    name: str
    placement: Any
    step: int
    scale: int

    def state(
        self, *, collect: bool = True, into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        assert collect, "its only rank keeps it"
        state = state_of(self.name, self.step, self.scale)
        return state if into is None else {name: into[name].copy_(state[name]) for name in state}


class Teller:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.saved_steps: list[int] = []

    def saving(self) -> None:
        pass

    def show(self, state: str) -> None:
        pass

    def saved(self, phase: str, step: int, path: str) -> None:
        self.saved_steps.append(step)

    def unsaved(self, message: str) -> None:
        self.messages.append(message)


def save(
    folder: Path, step: int, keep: int = 2, milestones: int | None = None, scale: int = 1
) -> Teller:
    """Both ranks save ``step``, and wait for it; what the first was told of it. ``scale``: times the usual size."""
    placements = [SimpleNamespace(name=n, first_rank=rank) for n, rank in NETWORKS.items()]
    keeping = CheckpointPolicy(folder, HASH, {}, "name: tiny\n", keep, milestones)
    tellers, savers = [], []
    for rank in range(2):
        trainers = [
            StudentTrainer(p.name, p, step, scale) for p in placements if p.first_rank == rank
        ]
        phase: Any = SimpleNamespace(
            name=PHASE,
            world_rank=rank,
            trainers=trainers,
            plan=SimpleNamespace(placements=placements, num_ranks=2),
            teacher=SimpleNamespace(anchor_state=dict),
        )
        teller: Any = Teller()
        saver = Saver(keeping, teller, (PHASE, step - 10))
        saver.save(phase, step)
        tellers.append(teller)
        savers.append(saver)
    for saver in savers:
        saver.wait()
    first: Teller = tellers[0]
    return first


def loaded_step(folder: Path, told: list[str]) -> int:
    """The step of the checkpoint that a run would go on from; its tensors are compared with what was saved."""
    found = find_latest(folder, HASH, told.append)
    assert found is not None, "no checkpoint"
    compare(*found)
    return found[1].step


def compare(path: Path, manifest: Manifest) -> None:
    """Every tensor is what it was when it was saved."""
    for name in NETWORKS:
        tensors = read_tensors(path / (name + SUFFIX))
        expected = state_of(name, manifest.step)
        assert tensors.keys() == expected.keys(), path
        assert all(torch.equal(tensors[key], expected[key]) for key in expected), path


def pointed_step(folder: Path) -> int:
    """The step of the checkpoint that the file ``latest`` names, loaded."""
    path = folder / (folder / LATEST).read_text().strip()
    manifest = read_manifest(path / MANIFEST_FILE)
    assert manifest is not None, f"{LATEST} names {path.name}, which has no manifest"
    compare(path, manifest)
    return manifest.step
