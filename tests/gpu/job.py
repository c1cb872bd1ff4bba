"""A small job in the real loop on one rank: stopped, killed and resumed; and with one student out of memory.

Crops are the benchmark's: no files, no decoder. The run folder is real: checkpoints, heartbeat, parked networks.
``python -m tests.gpu.job FOLDER DEVICE SIZES`` is the rank that is stopped and killed.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tests.gpu.clock import Figures
from tests.gpu.machine import ROOT
from tests.gpu.sizes import BY_NAME, Sizes
from tests.gpu.world import join_world, leave_world

if TYPE_CHECKING:
    from distill.train.phase import Decision, Phase

TIMEOUT = timedelta(minutes=2)
LIMIT = 1e-2  # of the weights: kernels on a GPU need not add up in the same order twice
PAUSED = "paused"
LOST_AFTER_S = 30.0
TOO_MANY_BYTES = 2**50
Weights = dict[str, dict[str, Tensor]]


class Recorder:
    """Stands in for the recorder: requests saves, pauses for ever after one step."""

    def __init__(self, folder: Path, sizes: Sizes, *, pauses: bool) -> None:
        self._folder, self._job, self._pauses = folder, sizes.job, pauses

    def record(
        self, phase: "Phase", step: int, faults: Callable[[], Sequence[float]]
    ) -> "Decision":
        """One step is over."""
        from distill.train.phase import Decision

        if self._pauses and step == self._job.pause_after:
            (self._folder / PAUSED).touch()
            time.sleep(4 * self._job.start_s)
        return Decision(save=step % self._job.save_every == 0, stop=False)


def train(
    folder: Path,
    device: torch.device,
    sizes: Sizes,
    *,
    pauses: bool = False,
    change: Callable[[Any], None] = lambda phase: None,
) -> tuple[int, Weights]:
    """Trains from the newest checkpoint of a folder, if any, to the end: the first step, and the students' averages."""
    from distill.bench.report import OURS
    from distill.bench.stand_ins import TimedSaver
    from distill.job.resume import agreed_checkpoint
    from distill.runfolder.heartbeat import Heartbeat
    from distill.runfolder.saver import restore
    from distill.train.faults import FaultHandler
    from distill.train.groups import make_control
    from distill.train.loop import run_phase
    from tests.gpu.bench import build_bench

    join_world(device)
    folder.mkdir(parents=True, exist_ok=True)
    phase = replace(build_bench(device, folder).phases[OURS], num_steps=sizes.job.steps)
    change(phase)
    control = make_control(TIMEOUT)
    found = agreed_checkpoint(folder / "checkpoints", "", control, lambda _: None)
    start = 0
    if found is not None:
        restore(phase, found)
        start = found[1].step
    faults, saver = FaultHandler(phase, folder), TimedSaver(folder)
    faults.start(start, control)
    with Heartbeat(folder, 0) as heartbeat:
        heartbeat.set_limit(sizes.job.limit_s)
        heartbeat.enter_phase(phase.name, start)
        recorder = Recorder(folder, sizes, pauses=pauses)
        run_phase(phase, recorder, saver, faults, heartbeat, start)
        saver.wait()
    return start, {trainer.name: trainer.ema() for trainer in phase.trainers}


def stopped_killed_resumed(device: torch.device, sizes: Sizes) -> Figures:
    """A rank is stopped, named by the watchdog, killed, and its run resumed: the averages are those of a run without."""
    from distill.launch.watchdog import Watchdog

    figures: Figures = {"problems": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [sys.executable, "-m", "tests.gpu.job", str(folder), str(device), sizes.name]
        with subprocess.Popen(command, cwd=ROOT) as rank:
            try:
                _, calm = train(Path(scratch) / "calm", device, sizes)
                _wait(
                    lambda: (folder / PAUSED).exists() or rank.poll() is not None, sizes.job.start_s
                )
                if not (folder / PAUSED).exists():
                    raise RuntimeError(f"the rank did not reach its pause: exit code {rank.poll()}")
                watchdog, reports = Watchdog(folder, 1, sizes.job.limit_s), list[Any]()
                rank.send_signal(signal.SIGSTOP)
                began = time.monotonic()
                _wait(lambda: reports.append(watchdog.look()) or reports[-1], LOST_AFTER_S)
                figures["named_after_s"] = round(time.monotonic() - began, 2)
                figures["named"] = reports[-1].message if reports[-1] else "nothing"
            finally:
                rank.kill()
        start, resumed = train(folder, device, sizes)
    figures["resumed_at_step"] = start
    figures["differs"] = {name: _apart(resumed[name], calm[name]) for name in calm}
    wrong = {
        "the stopped rank was not named": "its process is stopped" not in figures["named"],
        f"resumed at step {start}": not 0 < start < sizes.job.steps,
        "the resumed run differs": not max(figures["differs"].values()) <= LIMIT,
    }
    figures["problems"] = [what for what, is_wrong in wrong.items() if is_wrong]
    return figures


def out_of_memory(device: torch.device, sizes: Sizes) -> Figures:
    """One student finds no memory: it is parked, or the run starts again for smaller micro-batches; all end as without it."""
    from distill.errors import StudentError
    from distill.runfolder.parked import read_parked

    calls = list[int]()

    def spoil(phase: "Phase") -> None:
        engine: Any = phase.trainers[0].engine  # type: ignore[attr-defined]
        forward = engine.forward

        def fail(*inputs: Any) -> Any:
            calls.append(1)
            if len(calls) > 2:
                _run_out_of_memory(device)
            return forward(*inputs)

        engine.forward = fail

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        _, calm = train(Path(scratch) / "calm", device, sizes)
        (first, *others), parked, message = calm, None, ""
        try:
            _, found = train(folder, device, sizes, change=spoil)
            parked = read_parked(folder, first)
        except StudentError as error:
            message = str(error)
            _, found = train(folder, device, sizes)
    outcome = message if parked is None else parked.describe()
    compared = [first, *others] if parked is None else others
    apart = max(_apart(found[name], calm[name]) for name in compared)
    wrong = {
        "nothing came of it": not outcome,
        f"it was called {len(calls)} times": len(calls) != 3,
        f"the others differ by {apart:.2g}": not apart <= LIMIT,
    }
    problems = [what for what, is_wrong in wrong.items() if is_wrong]
    return {"outcome": outcome, "others_differ": apart, "problems": problems}


def _run_out_of_memory(device: torch.device) -> None:
    """Asks for more than there is. The CPU's allocator has another error."""
    try:
        torch.empty(TOO_MANY_BYTES, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        raise torch.OutOfMemoryError(str(error)) from error


def _wait(is_done: Callable[[], Any], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not is_done() and time.monotonic() < deadline:
        time.sleep(0.1)


def _apart(found: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Length of the difference over the length of the weights."""
    apart = sum(float((found[name] - other[name]).double().square().sum()) for name in other)
    length = sum(float(other[name].double().square().sum()) for name in other)
    return float((apart / length) ** 0.5)


def main(words: Sequence[str]) -> None:
    """The rank that is stopped and killed."""
    folder, device, sizes = words
    try:
        train(Path(folder), torch.device(device), BY_NAME[sizes], pauses=True)
    finally:
        leave_world()


if __name__ == "__main__":
    main(sys.argv[1:])
