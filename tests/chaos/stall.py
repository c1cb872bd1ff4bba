"""What a save, or a copy in memory, costs the loop beside a plain copy of the same bytes into touched memory, and how long it takes until it is complete.

Seconds of the clock and of the processor: other work on the machine makes the first longer.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine.engine import to_host
from distill.engine.held_copies import Nodes, folder_here
from distill.engine.peer_copies import PeerCopies
from distill.runfolder.saver import CheckpointPolicy, Saver
from tests.chaos.saves import HASH, PHASE, Teller

NUM_TENSORS = 600  # about what weights, two moments and the average of a ViT-S are
KINDS = 4  # weights, two moments, average: read from the same memory here, so that large ones fit


def run(arguments: list[str]) -> bool:
    """Saves a network's state of ``--mb`` megabytes ``--count`` times; only a save that fails is a failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos stall")
    parser.add_argument("--mb", type=int, default=400)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="copies in memory in place of saves")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as one of several ranks of a machine has
    size = options.mb * 1_000_000 // (4 * NUM_TENSORS)
    weights = [torch.randn(size) for _ in range(NUM_TENSORS // KINDS)]
    live = {f"weight/{index}": weights[index % len(weights)] for index in range(NUM_TENSORS)}
    memory = dict[str, Tensor]()  # of the last save
    trainer = _trainer(live, memory)
    phase: Any = SimpleNamespace(
        name=PHASE,
        world_rank=0,
        trainers=[trainer],
        plan=SimpleNamespace(placements=[trainer.placement], num_ranks=1),
        teacher=SimpleNamespace(anchor_state=dict),
    )
    stalls, totals, copies = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        policy = CheckpointPolicy(Path(scratch) / "checkpoints", HASH, {}, "name: x\n", 1, None)
        teller = Teller()
        saver = _peers(policy) if options.peer else Saver(policy, teller, None)
        begin = saver.copy if isinstance(saver, PeerCopies) else saver.save
        if isinstance(saver, PeerCopies):
            saver.prepare(PHASE, {"student.safetensors": live})
            saver.wait()
        else:
            saver.prepare(phase)
        for step in range(1, options.count + 1):
            started = time.perf_counter()
            stalls.append(_timed(lambda step=step: begin(phase, step)))
            saver.wait()
            totals.append(time.perf_counter() - started)
            copies.append(_timed(lambda: [memory[n].copy_(live[n]) for n in live]))
        if isinstance(saver, PeerCopies):
            is_good = saver.cost is not None and saver.cost.step == options.count
            saver.remove(is_saved=True)
            dist.destroy_process_group()
        else:
            is_good = not teller.messages and len(teller.saved_steps) == options.count
    kind = "copies in memory" if options.peer else "saves"
    print(f"stall: {options.count} {kind} of {options.mb} MB, medians")
    wall, cpu, plain, plain_cpu = (
        median(each[part] for each in rows) for rows in (stalls, copies) for part in (0, 1)
    )
    print(
        f"  the loop waits {wall:.3f} s (at most {max(stalls)[0]:.3f} s), until complete {median(totals):.3f} s"
    )
    print(f"  a plain copy of the same bytes into touched memory takes {plain:.3f} s")
    print(
        f"  {wall / plain:.2f} times that, in processor seconds {cpu / max(1e-9, plain_cpu):.2f} times"
    )
    return not is_good


def _trainer(live: Mapping[str, Tensor], memory: dict[str, Tensor]) -> Any:
    """A network with that state, which copies it as an engine does."""

    def state(*, collect: bool, into: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        assert collect, "its only rank keeps it"
        copy = {name: to_host(each, into and into[name]) for name, each in live.items()}
        memory.update(copy)
        return copy

    placement = SimpleNamespace(name="student", first_rank=0)
    return SimpleNamespace(name="student", placement=placement, state=state)


def _peers(policy: CheckpointPolicy) -> PeerCopies:
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, not listed
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    folder = folder_here(policy.folder.parent) / "stall"
    return PeerCopies(policy, Nodes(0, ("here",), (0,), folder), dist.group.WORLD, 1)


def _timed(act: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor on this thread."""
    started, used = time.perf_counter(), _used_s()
    act()
    return time.perf_counter() - started, _used_s() - used


def _used_s() -> float:
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return used.ru_utime + used.ru_stime
