"""What a save costs the loop, beside a plain copy of the same bytes into touched memory: until the loop may go on, and until everything is on disk."""

import argparse
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from distill.engine.engine import to_host
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
    memory = dict[str, Tensor]()  # of the last save

    def state(*, collect: bool, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        assert collect, "its only rank keeps it"
        copy = {name: to_host(each, into and into[name]) for name, each in live.items()}
        memory.update(copy)
        return copy

    trainer = SimpleNamespace(name="student", placement=placement, state=state)
    phase: Any = SimpleNamespace(
        name=PHASE,
        world_rank=0,
        trainers=[trainer],
        plan=SimpleNamespace(placements=[placement], num_ranks=1),
        teacher=SimpleNamespace(anchor_state=dict),
    )
    stalls, wholes, copies = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        teller = Teller()
        saver = Saver(CheckpointPolicy(Path(scratch), HASH, {}, "name: x\n", 1, None), teller, None)
        for step in range(1, options.count + 1):
            started = time.perf_counter(), used_s()
            saver.save(phase, step)
            stalls.append((time.perf_counter() - started[0], used_s() - started[1]))
            saver.wait()
            wholes.append(time.perf_counter() - started[0])
            started = time.perf_counter(), used_s()
            for name, tensor in live.items():
                memory[name].copy_(tensor)
            copies.append((time.perf_counter() - started[0], used_s() - started[1]))
    first, *later = stalls
    stall, copy, whole = (median(each[0] for each in later or stalls), *(0.0, median(wholes)))
    copy = median(each[0] for each in copies)
    print(f"stall: {options.count} saves of {options.mb} MB, medians after the first")
    print(
        f"  the loop waits {stall:.3f} s (the first time {first[0]:.3f} s), a save takes {whole:.3f} s: {whole / stall:.1f} times less"
    )
    print(
        f"  a plain copy of the same bytes into touched memory takes {copy:.3f} s: {stall / copy:.2f} times that"
    )
    return bool(teller.messages) or len(teller.saved_steps) != options.count


def used_s() -> float:
    """Processor seconds of this thread."""
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return used.ru_utime + used.ru_stime
