"""Saves and restores the trained networks of a phase, each by its own group, and asks nothing of the layout."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from distill import checkpoint
from distill.record import Recorder

if TYPE_CHECKING:
    from distill.loop import Phase

ANCHOR_FILE = (
    "gram-anchor"  # not a legal network name: those have no file of this name in a checkpoint
)


class Saver:
    """Writes checkpoints of one run."""

    def __init__(self, folder: Path, recipe_hash: str, keep: int, recorder: Recorder) -> None:
        self._folder, self._recipe_hash, self._keep, self._recorder = (
            folder,
            recipe_hash,
            keep,
            recorder,
        )

    def save(self, phase: "Phase", step: int) -> None:
        """Saves every network after ``step`` finished steps. Collective over the world: gathers per group, one barrier."""
        self._recorder.show("saving")
        staging = checkpoint.staging_folder(self._folder, phase.name, step)
        for pupil in phase.pupils:
            is_first = pupil.placement.first_rank == phase.world_rank
            state = pupil.state(keep=is_first)
            if is_first:
                checkpoint.write_tensors(staging / f"{pupil.name}.safetensors", state)
        anchor = phase.teacher.anchor_state()
        if phase.world_rank == 0 and anchor:
            checkpoint.write_tensors(staging / f"{ANCHOR_FILE}.safetensors", anchor)
        dist.barrier()
        if phase.world_rank == 0:
            path = checkpoint.commit(self._folder, phase.name, step, self._recipe_hash, self._keep)
            self._recorder.saved(phase.name, step, str(path.relative_to(self._folder.parent)))
        dist.barrier()


def restore(phase: "Phase", saved: Path) -> None:
    """Loads every network of the phase that the checkpoint holds. No communication: each rank reads what it needs."""
    for pupil in phase.pupils:
        pupil.load_state(checkpoint.read_tensors(saved / f"{pupil.name}.safetensors"))


def saved_anchor(saved: Path) -> dict[str, Tensor]:
    """The Gram anchor's weights in a checkpoint of a Gram stage."""
    return checkpoint.read_tensors(saved / f"{ANCHOR_FILE}.safetensors")
