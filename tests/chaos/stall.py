"""What a save costs the loop: until it may go on, and until everything is on disk, which is what it would wait for otherwise."""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from distill.runfolder.saver import CheckpointPolicy, Saver
from tests.chaos.saves import HASH, PHASE, Teller

NUM_TENSORS = 600  # about what weights, two moments and the average of a ViT-S are


def run(arguments: list[str]) -> bool:
    """Saves a network's state of ``--mb`` megabytes ``--count`` times; only a save that fails is a failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos stall")
    parser.add_argument("--mb", type=int, default=400)
    parser.add_argument("--count", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as one of several ranks of a machine has
    size = options.mb * 1_000_000 // (4 * NUM_TENSORS)
    live = {f"weight/{number}": torch.randn(size) for number in range(NUM_TENSORS)}
    placement = SimpleNamespace(name="student", first_rank=0)

    def state(*, collect: bool) -> dict[str, torch.Tensor]:
        assert collect, "its only rank keeps it"
        return {name: tensor.clone() for name, tensor in live.items()}

    trainer = SimpleNamespace(name="student", placement=placement, state=state)
    phase: Any = SimpleNamespace(
        name=PHASE,
        world_rank=0,
        trainers=[trainer],
        plan=SimpleNamespace(placements=[placement], num_ranks=1),
        teacher=SimpleNamespace(anchor_state=dict),
    )
    stalls, wholes = [], []
    with tempfile.TemporaryDirectory() as scratch:
        teller = Teller()
        saver = Saver(CheckpointPolicy(Path(scratch), HASH, {}, "name: x\n", 2, None), teller, None)
        for step in range(1, options.count + 1):
            started = time.perf_counter()
            saver.save(phase, step)
            stalls.append(time.perf_counter() - started)
            saver.wait()
            wholes.append(time.perf_counter() - started)
    stall, whole = median(stalls), median(wholes)
    print(f"stall: {options.count} saves of {options.mb} MB, medians")
    print(
        f"  the loop waits {stall:.3f} s, a save takes {whole:.3f} s: {whole / stall:.1f} times less"
    )
    return bool(teller.messages) or len(teller.saved_steps) != options.count
