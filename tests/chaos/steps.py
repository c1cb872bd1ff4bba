"""Steps without end in one process: memory, open files and threads must not grow with their number.

Loop, masks, exchange, agreement, recorder with its metrics, and heartbeat are the product's; networks are
stand-ins that take no time, and pixels are noise.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from distill.bench.measure import OURS, TIMEOUT, Bench, Request, family_of
from distill.bench.stand_ins import SleepingStudent, Unsaved
from distill.engine.engine import StepRates
from distill.runfolder.heartbeat import Heartbeat
from distill.runfolder.requests import StopSaveRequests
from distill.runfolder.status import PhaseStatus
from distill.train.faults import FaultHandler
from distill.train.groups import make_control
from distill.train.loop import run_phase
from distill.train.phase import Phase
from distill.train.recorder import Recorder, RecordPolicy
from distill.train.schedule import StepNumbers
from tests.support.spawn import on_ranks

SAMPLES = 50
SETTLED = 0.2  # of the steps: what is held then is all that there is
MOST_MB_PER_MILLION = 16.0
Sample = tuple[int, float, int, int]  # step, anonymous MB, descriptors, threads


def run(arguments: list[str]) -> bool:
    """True when something grows."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos steps", description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--recipe", default="quickstart")
    options = parser.parse_args(arguments)
    started, limit_s = time.monotonic(), 120 + options.count / 20
    (samples,) = on_ranks(1, walk, options.recipe, options.count, timeout_s=limit_s)
    settled = next(each for each in samples if each[0] >= SETTLED * options.count)
    last = samples[-1]
    rate = options.count / (time.monotonic() - started)
    print(f"steps: {options.count} on stand-ins in one process, {rate:.0f} a second")
    for step, megabytes, descriptors, threads in (samples[0], settled, last):
        print(f"  step {step}: {megabytes:.1f} MB, {descriptors} descriptors, {threads} threads")
    growth = (last[1] - settled[1]) / (last[0] - settled[0]) * 1e6
    print(f"  {growth:.1f} MB per million steps since step {settled[0]}")
    allowed = max(MOST_MB_PER_MILLION, 2e6 / options.count)  # a heap moves by 2 MB at any time
    return growth > allowed or last[2] > settled[2] or last[3] > settled[3]


def walk(recipe: str, count: int) -> list[Sample]:
    """Takes the steps on this rank; what the process holds on the way."""
    overrides = (f"schedule.steps={count}", "schedule.lr.warmup=0", "schedule.batch=4")
    request = Request(recipe, overrides, (), 1, 1, 0, 1e-9, None, 1.0)
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(request, *family_of(request), torch.device("cpu"))
        phase = bench.phases[OURS]

        def after_step(phase_step: int) -> None:
            if phase.after_step is not None:
                phase.after_step(phase_step)
            if phase_step % max(1, count // SAMPLES) == 0:
                samples.append(_sample(phase_step))

        trainers = tuple(_Student(each.placement, each.group, 0.0, 0) for each in phase.trainers)
        watched = replace(
            phase,
            num_steps=count,
            after_step=after_step,
            trainers=trainers,
            schedule=_Schedule(phase),
        )
        networks = tuple(trainer.name for trainer in phase.trainers)
        recorder = Recorder(
            folder,
            [PhaseStatus(phase.name, count, 1.0, networks)],
            StopSaveRequests(folder),
            RecordPolicy(10, None, []),
            "",
            make_control(TIMEOUT),
        )
        recorder.start(watched, 0)
        heartbeat, faults = Heartbeat(folder, 0), FaultHandler(watched, folder)
        heartbeat.enter_phase(phase.name, 0)
        assert run_phase(watched, recorder, Unsaved(), faults, heartbeat, 0)
        recorder.finish_phase()
        phase.loader.close()
    return samples


class _Schedule:
    """The phase's, with rates to write down."""

    def __init__(self, phase: Phase) -> None:
        self._schedule, rates = phase.schedule, StepRates(0.0, 0.0, 0.0, 0.0)
        self._rates = {trainer.name: rates for trainer in phase.trainers}

    def at(self, run_step: int) -> StepNumbers:
        return replace(self._schedule.at(run_step), rates=self._rates)


class _Student(SleepingStudent):
    """Has a loss to write down."""

    def read_metrics(self, wait: float) -> dict[str, float]:
        return {"loss": 1.0, "grad_norm": 1.0, "skipped": 0.0, "wait": wait}


def _sample(step: int) -> Sample:
    lines = Path("/proc/self/status").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    return step, int(facts["RssAnon"].split()[0]) / 1e3, descriptors, int(facts["Threads"])
