"""Numbers out of the loop at the logging interval, and the answer to "save? stop?" that all ranks share.

Between intervals nothing is read from the device. At an interval each network's group averages its
numbers (one all-reduce). Then, and every ``VOTE_S`` whatever the interval is, the world agrees on one
small vector: stop requested, save due, worst loader wait, seconds of a step. It is read when the
look-ahead has passed, so that no rank waits for the one furthest behind.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from distill.data.bad_samples import FILE as BAD_SAMPLES_FILE
from distill.data.bad_samples import count_bad
from distill.engine.delayed_reduce import DelayedAllReduce
from distill.errors import UserError
from distill.runfolder.metrics import MetricSink, MetricsRow, MetricsWriter, SinkFactory, drop_after
from distill.runfolder.requests import StopSaveRequests
from distill.runfolder.status import (
    CheckpointStatus,
    NetworkState,
    NetworkStatus,
    PhaseStatus,
    RunState,
    Status,
    StatusFile,
    networks_in,
    work_done,
)
from distill.train.phase import Decision, Phase

VOTE_S = 0.1  # between two votes: each step where steps take as long; a vote costs some 0.1 ms


@dataclass(frozen=True)
class RecordPolicy:
    """When numbers are written, and when a save is due.

    ``log_every``: steps of an interval. ``save_every_s``: seconds between saves. ``save_every_steps``: a
    save is due where any of these numbers of steps is passed.
    """

    log_every: int
    save_every_s: float | None
    save_every_steps: Sequence[int]


class Recorder:
    """Writes metrics and status; one per process, the same calls on every rank."""

    def __init__(
        self,
        run_folder: Path,
        phases: Sequence[PhaseStatus],
        requests: StopSaveRequests,
        policy: RecordPolicy,
        resume_command: str,
        control: dist.ProcessGroup,
        open_sinks: SinkFactory = MetricsWriter,
    ) -> None:
        """``control`` is a gloo group of the world."""
        self._run_folder, self._requests = run_folder, requests
        self._world_rank = dist.get_rank(control)
        self._control, self._policy, self._open_sinks = control, policy, open_sinks
        self._file = StatusFile(run_folder)
        previous = None
        with suppress(UserError):  # a power cut may leave anything; it is written anew
            previous = self._file.read() if self._world_rank == 0 else None
        started = previous.started_unix if previous else time.time()
        self.status = Status(
            state="preparing",
            started_unix=started,
            updated_unix=time.time(),
            phases=tuple(phases),
            last_checkpoint=previous.last_checkpoint if previous else None,
            resume_command=resume_command,
        )
        self._writers: dict[str, MetricSink] = {}
        self._last_save = time.monotonic()
        self._save_s: float | None = None  # how long the last one took
        self._images_trained, self._loader_wait, self._complaint = 0, 0.0, ""
        self._report_save: Callable[[str], None] = lambda _: None

    def report_saves_to(self, report: Callable[[str], None]) -> None:
        """Gives the result of every save to ``report`` as well, empty for a good one: the status may lie on a full disk."""
        if self._world_rank == 0:
            self._report_save = report

    def save_more(self, every_s: float | None, every_steps: int | None) -> None:
        """From now on a save is due at these intervals too; the same on every rank."""
        policy = self._policy
        steps = policy.save_every_steps
        if every_steps is not None:
            steps = (*steps, every_steps)
        least_s = min((s for s in (policy.save_every_s, every_s) if s is not None), default=None)
        self._policy = replace(policy, save_every_s=least_s, save_every_steps=steps)

    def start(self, phase: Phase, start_step: int) -> None:
        """Begins a phase at ``start_step``; metrics past that point (of a run that died) are dropped."""
        names = [p.name for p in self.status.phases]
        for trainer in phase.trainers:
            if trainer.placement.first_rank == self._world_rank:
                drop_after(
                    self._run_folder, trainer.name, phases=names, phase=phase.name, step=start_step
                )
                self._writers[trainer.name] = self._open_sinks(self._run_folder, trainer.name)
        networks = {
            p.name: NetworkStatus(tuple(p.world_ranks), "training") for p in phase.plan.placements
        }
        self.show(
            "training",
            phase=phase.name,
            step=start_step,
            networks=networks,
            phase_started_unix=time.time(),
        )
        self._phase_start_step = self._interval_step = start_step
        self._phase_started = self._interval_started = time.monotonic()
        self._marks = read_clocks(phase)
        self._delayed_reduce = DelayedAllReduce(self._control, max(1, phase.lookahead))
        self._voted, self._voted_step, self._vote_every = self._phase_started, start_step, 1
        self._local_wait = 0.0
        self._faults: Sequence[float] = [0.0] * (3 * len(phase.plan.placements))

    def show(self, state: RunState, **changes: object) -> None:
        """Changes the status; written by world rank 0."""
        self.status = replace(self.status, state=state, updated_unix=time.time(), **changes)  # type: ignore[arg-type]
        if state != "training":
            self.status = replace(self.status, networks=networks_in(state, self.status.networks))
        if self._world_rank == 0:
            self._file.write(self.status)

    def saving(self) -> None:
        """Notes that a save begins; the next one is due from now on."""
        self._last_save = time.monotonic()
        self.show("saving")

    def saved(self, phase: str, step: int, path: str) -> None:
        """Notes a finished checkpoint."""
        done = CheckpointStatus(phase, step, path, time.time())
        self._save_s = time.monotonic() - self._last_save
        text = self.status.message
        message = "" if text == self._complaint else text
        self.show(self.status.state, last_checkpoint=done, message=message)
        self._report_save("")

    def unsaved(self, message: str) -> None:
        """Notes a checkpoint that could not be written; the message stays until one is."""
        self._complaint = message
        self.show(self.status.state, message=message)
        self._report_save(message)

    def record(self, phase: Phase, step: int, faults: Callable[[], Sequence[float]]) -> Decision:
        """Counts a finished step; at the interval, and at the last step, writes numbers.

        The ranks agree on what to do then, and about every ``VOTE_S`` of its slowest rank between: each step where
        steps are long. The answer comes ``lookahead`` steps later, at least one, at the last step at once. ``faults`` gives of every
        network of the plan steps skipped, roll-backs and 1 if parked, as far as this rank knows.

        Raises:
            UserError: every network is parked, on all ranks alike.
        """
        is_last = step == phase.num_steps
        answers = []
        due_step = self._delayed_reduce.due_step
        if due_step is not None and (is_last or step >= due_step):
            answers.append(self._delayed_reduce.result())
        saves_now, since = False, self._interval_step
        is_interval = step % self._policy.log_every == 0 or is_last
        if is_interval:
            self._faults = faults()  # first: a step that is trained again belongs to this interval
            self._local_wait = self._write(phase, step)
            saves_now = any(
                step // every > since // every for every in self._policy.save_every_steps
            )
        is_open = self._delayed_reduce.due_step is not None
        if not is_open and (is_interval or step % self._vote_every == 0):
            self._delayed_reduce.start(step, self._votes(step), dist.ReduceOp.MAX)
            if is_last:
                answers.append(self._delayed_reduce.result())
        stop = save = False
        for answer in answers:
            stop_votes, save_votes, self._loader_wait, step_s, *found = answer.tolist()
            stop, save = stop or bool(stop_votes), save or bool(save_votes)
            self._vote_every = max(1, min(self._policy.log_every, math.ceil(VOTE_S / step_s)))
            self._take_faults(phase, found)
        if stop:
            about = "" if self._save_s is None else f"; the last save took {self._save_s:.1f} s"
            self.show(self.status.state, message=f"stopping after {phase.name} step {step}{about}")
        return Decision(save=(save or saves_now) and not is_last, stop=stop)

    def _write(self, phase: Phase, step: int) -> float:
        """Metrics and status of the interval that ends at ``step``; this rank's loader wait as a part of its time."""
        elapsed = max(1e-9, time.monotonic() - self._interval_started)
        num_steps = step - self._interval_step
        clocks = read_clocks(phase)
        loader_s, exchange_s = (
            now - before for now, before in zip(clocks, self._marks, strict=True)
        )
        images_per_s = num_steps * phase.plan.images_global / elapsed
        numbers = phase.schedule.at(phase.first_step + step - 1)
        for trainer in phase.trainers:
            values = trainer.read_metrics(wait=exchange_s / elapsed)
            if values is not None and trainer.name in self._writers:
                row = MetricsRow(
                    phase=phase.name,
                    step=step,
                    time_unix=time.time(),
                    loss=values.pop("loss"),
                    grad_norm=values.pop("grad_norm"),
                    lr=numbers.rates[trainer.name].lr,
                    wait=values.pop("wait"),
                    images_per_s=images_per_s,
                    skipped=int(values.pop("skipped")),
                    terms=values,
                )
                self._writers[trainer.name].write(row)
        self._images_trained += num_steps * phase.plan.images_global
        done = work_done(self.status.phases, phase.name, step)
        before = work_done(self.status.phases, phase.name, self._phase_start_step)
        phase_s = time.monotonic() - self._phase_started
        left = {p.name for p in phase.plan_schedule.at(phase.first_step + step).placements}
        self.show(
            "training",
            step=step,
            networks={
                name: network
                if name in left or network.state == "parked"
                else replace(network, state="done")
                for name, network in self.status.networks.items()
            },
            step_s=elapsed / num_steps,
            work_done=done,
            eta_s=(1.0 - done) * phase_s / max(1e-9, done - before),
            loader_wait=self._loader_wait,
            images_per_s=images_per_s,
            bad_samples=count_bad(self._run_folder / BAD_SAMPLES_FILE),
        )
        self._interval_started, self._interval_step, self._marks = time.monotonic(), step, clocks
        return loader_s / elapsed

    def finish_phase(self) -> None:
        """Closes the phase's metric files."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def take_images(self) -> int:
        """Images trained on since the last call."""
        taken, self._images_trained = self._images_trained, 0
        return taken

    def _take_faults(self, phase: Phase, found: Sequence[float]) -> None:
        """How every network of the world fares, into the status."""
        networks = dict(self.status.networks)
        for index, placement in enumerate(phase.plan.placements):
            skipped, rolled_back, is_parked = map(int, found[3 * index : 3 * index + 3])
            network = networks[placement.name]
            state: NetworkState = "parked" if is_parked else network.state
            networks[placement.name] = replace(
                network, state=state, skipped=skipped, rolled_back=rolled_back
            )
        self.show(self.status.state, networks=networks)
        if all(network.state == "parked" for network in networks.values()):
            raise UserError(
                f"{phase.name}: every network is parked, nothing is left to train ({', '.join(networks)})",
                fix=f"See {self._run_folder / 'events.jsonl'}; a network is tried again from its last "
                f"checkpoint when its file in {self._run_folder / 'parked'} is deleted.",
            )

    def _votes(self, step: int) -> torch.Tensor:
        """Stop requested on this rank, save requested or due by the clock of rank 0, loader wait, seconds per step, faults."""
        now = time.monotonic()
        step_s = (now - self._voted) / max(1, step - self._voted_step)
        self._voted, self._voted_step = now, step
        due = (
            self._policy.save_every_s is not None
            and time.monotonic() - self._last_save >= self._policy.save_every_s
        )
        saves = self._requests.take_save() or (due and self._world_rank == 0)
        votes = self._requests.to_stop(), saves, self._local_wait, max(1e-9, step_s), *self._faults
        return torch.tensor(votes, dtype=torch.float64)


def read_clocks(phase: Phase) -> tuple[float, float]:
    """Seconds that this rank has waited for images, and for the exchange."""
    return phase.loader.wait_s, phase.exchange.wait_s
