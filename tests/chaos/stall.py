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

from distill.engine.config import EngineSettings
from distill.engine.engine import Engine, prepare_deepspeed, to_host
from distill.engine.held_copies import Nodes, folder_here
from distill.engine.peer_copies import PeerCopies
from distill.plan.placement import NetworkCost
from distill.plan.plan import PlanOptions, make_plan
from distill.runfolder.saver import CheckpointPolicy, Saver
from distill.train.faults import FaultHandler
from distill.train.student import StudentTrainer
from tests.chaos.saves import HASH, PHASE, Teller
from tests.support.spawn import on_ranks

NUM_TENSORS = 600  # about what weights, two moments and the average of a ViT-S are
KINDS = 4  # weights, two moments, average: read from the same memory here, so that large ones fit


def run(arguments: list[str]) -> bool:
    """Saves a network's state of ``--mb`` megabytes ``--count`` times; only a save that fails is a failure."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos stall")
    parser.add_argument("--mb", type=int, default=400)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="copies in memory in place of saves")
    parser.add_argument(
        "--engine", action="store_true", help="a real engine, checked and kept to go back to"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as one of several ranks of a machine has
    if options.engine:
        (rows,) = on_ranks(1, time_engine, options.mb, options.count, timeout_s=3600)
        print(f"stall: {options.count} saves of an engine of {options.mb} MB, medians")
        plain = [median(each[part] for each in rows["a plain copy"]) for part in (0, 1)]
        for name, each in rows.items():
            wall, cpu = (median(row[part] for row in each) for part in (0, 1))
            ratios = (
                f"{wall / plain[0]:.2f} plain copies, in processor seconds {cpu / plain[1]:.2f}"
            )
            print(f"  {name}: {wall:.3f} s of the loop (at most {max(each)[0]:.3f} s), {ratios}")
        return False
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


def time_engine(megabytes: int, count: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of saves of an engine on one rank as the loop makes them, of a plain copy, and of check, snapshot and copy one after another."""
    torch.set_num_threads(1)
    prepare_deepspeed("cpu")
    group, width = dist.new_group([0]), 1000
    depth = max(1, megabytes * 1_000_000 // (16 * width * width))
    module = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(depth)))
    engine = Engine(module, group, group, EngineSettings(1, "fp32", 3.0, 1))
    plan = make_plan([NetworkCost("student", 1.0)], 1.0, 1, 1, PlanOptions())
    targets: Any = SimpleNamespace(state=dict, load_state=lambda _: None)
    trainer = StudentTrainer("student", plan.placements[0], engine, targets)
    phase: Any = SimpleNamespace(
        name=PHASE,
        world_rank=0,
        trainers=[trainer],
        plan=plan,
        teacher=SimpleNamespace(anchor_state=dict),
    )
    teller, rows = Teller(), dict[str, list[tuple[float, float]]]()
    live, memory, snapshot = trainer.state(), trainer.state(), engine.snapshot()
    with tempfile.TemporaryDirectory() as scratch:
        policy = CheckpointPolicy(Path(scratch) / "checkpoints", HASH, {}, "name: x\n", 1, None)
        saver, faults = Saver(policy, teller, None), FaultHandler(phase, Path(scratch))
        saver.prepare(phase, faults.start(0, group))
        acts: dict[str, Callable[[int], object]] = {
            "a save": lambda step: saver.save(phase, step, faults.before_save(step)),
            "check, snapshot and copy in turn": lambda _: (
                engine.is_finite(),
                engine.snapshot(snapshot),
                trainer.state(into=memory),
            ),
            "a plain copy": lambda _: [memory[n].copy_(live[n]) for n in live],
        }
        for step in range(1, count + 1):
            for name, act in acts.items():
                rows.setdefault(name, []).append(_timed(lambda act=act, step=step: act(step)))
                saver.wait()
    assert not teller.messages, teller.messages
    return rows


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
