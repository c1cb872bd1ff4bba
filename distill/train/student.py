"""One network in training on this rank: its targets, its step, its seconds, its numbers."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from distill.engine.engine import Engine, StateSnapshot
from distill.plan.slices import Placement
from distill.train.schedule import StepNumbers
from students.batch_norm import RunningStatistics
from teacher.batch import StudentBatch
from teacher.chunks import sinkhorn
from teacher.heads import Head
from teacher.losses import KoleoGradient, Losses
from teacher.peers import StreamMark, StreamMarks, mark, timing_peers
from teacher.shapes import KOLEO_GROUP
from teacher.task import DistillationTask, SoftAssignments

TARGETS_PREFIX = "targets/"  # of a target maker's tensors in a network's state


@runtime_checkable
class Targets(Protocol):
    """What the loss of a slice compares with."""

    def part(self, images: slice, masked: slice) -> "Targets":
        """Of some images of the slice and their masked patches."""
        ...


@runtime_checkable
class TargetBuilder(Protocol):
    """Turns the teacher's features of a slice into what the network's loss compares with."""

    def build_targets(
        self, batch: StudentBatch, temperature: float, group: dist.ProcessGroup | None
    ) -> Targets:
        """The targets; collective over ``group`` where there is one."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What has to be saved to go on, the same on every rank of the group."""
        ...

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of ``state``."""
        ...


@dataclass(frozen=True)
class SinkhornTargets:
    """Targets for heads: Sinkhorn assignments to the prototypes of the teacher's heads. No state."""

    dino_head: Head
    ibot_head: Head

    def build_targets(
        self, batch: StudentBatch, temperature: float, group: dist.ProcessGroup | None
    ) -> SoftAssignments:
        """SoftAssignments of the slice; the balance is over the full group."""
        class_features = batch.targets.class_features.transpose(0, 1).flatten(0, 1)
        dino, ibot = self.dino_head.prototypes, self.ibot_head.prototypes
        patch_features = batch.targets.patch_features
        return SoftAssignments(
            sinkhorn(class_features, dino.weight, temperature, group, dino.steps),
            sinkhorn(patch_features, ibot.weight, temperature, group, ibot.steps),
        )

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Nothing to load."""


@dataclass(frozen=True)
class Attempt:
    """One step of a network: whether it was applied, on the device and the same on every rank of the group, and its loss and terms here."""

    is_applied: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class Snapshot:
    """What one rank holds of a network, of its targets' state and its running statistics, to go back to.

    ``state``: of a network that trains on this rank alone, all of it as it is saved; of another one nothing,
    and this rank's shards are in ``engine``.
    """

    state: dict[str, Tensor]
    engine: StateSnapshot
    beside: dict[str, Tensor]


@dataclass(frozen=True)
class _Span:
    """One stretch of work in a GPU's stream, and the waits for other ranks inside."""

    start: StreamMark
    stop: StreamMark
    waits: list[StreamMarks]
    units: int

    def seconds(self) -> float:
        """Without the waits; only of a span whose end was passed."""
        spans = ((self.start, self.stop, 1.0), *((*marks, -1.0) for marks in self.waits))
        return sum(sign * start.elapsed_time(stop) for start, stop, sign in spans) / 1e3


class Stopwatch:
    """Adds up seconds of one kind of work on a device, and how many units were done in them, without waiting.

    On a GPU the clock runs on the device: a span lies between two marks in its stream and counts, with its
    units, from when the stream has passed the second; what lies ``waiting_for_peers`` does not count. On
    a CPU all that passes inside counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._total_s = 0.0
        self.units = 0
        self._spans: deque[_Span] = deque()

    @contextmanager
    def running(self, units: int = 1) -> Iterator[None]:
        """Counts what is started inside, as so many units."""
        if self._is_cuda:
            self._take_finished()  # so that few are kept where nothing reads them
            start = mark()
            with timing_peers() as waits:
                yield
            self._spans.append(_Span(start, mark(), waits, units))
        else:
            self.units += units
            started = time.perf_counter()
            yield
            self._total_s += time.perf_counter() - started

    def read_s(self) -> float:
        """Seconds so far. On a GPU, of spans that are finished; nothing is waited for."""
        if self._is_cuda:
            self._take_finished()
        return self._total_s

    def _take_finished(self) -> None:
        while self._spans and self._spans[0].stop.query():
            span = self._spans.popleft()
            self._total_s += span.seconds()
            self.units += span.units


class StudentTrainer:
    """A trained network on one of its ranks. Numbers stay on the device until ``read_metrics``."""

    def __init__(
        self,
        name: str,
        placement: Placement,
        engine: Engine,
        targets: TargetBuilder,
        *,
        parts: Sequence[slice] = (slice(None),),
        num_steps: int | None = None,
        prepare: Callable[[StudentBatch, int], StudentBatch] = lambda batch, _: batch,
    ) -> None:
        """What one network needs on one rank.

        ``parts``: micro-batches of this rank's slice; ``num_steps``: of the phase, after which the
        network is finished, None for all; ``prepare``: adds to the batch of a step what only this network needs.
        """
        self._prepare = prepare
        self._parts, self.stop_step = parts, num_steps
        self.name, self.placement, self.engine = name, placement, engine
        self.images = placement.slices[dist.get_rank(engine.group)]
        self.targets, norms = targets, RunningStatistics(engine.module)
        self._norms = norms if norms else None
        self.training = Stopwatch(next(engine.module.parameters()).device)
        self._sums: dict[str, Tensor] = {}
        self._num_steps = 0

    def train_step(self, batch: StudentBatch, numbers: StepNumbers) -> Attempt:
        """One step of this network; a skipped one changes nothing. Collective over its group: targets, KoLeo where cut, gradients, running statistics."""
        terms, before = dict[str, Tensor](), self._state_beside()
        group = self.group if dist.get_world_size(self.group) > 1 else None
        batch = self._prepare(batch, numbers.run_step)
        with self.training.running():
            targets = self.targets.build_targets(batch, numbers.temperature, group)
            koleo = self._koleo_before(batch, numbers)
            for images in self._parts:
                part, its_targets = batch, targets
                if len(self._parts) > 1:
                    part = batch.part(images)
                    its_targets = targets.part(images, batch.masks.masked(images))
                shares = () if koleo is None else (koleo.part(images),)
                losses: Losses = self.engine.forward(part, its_targets, numbers.scalars, *shares)
                self.engine.backward_and_step(losses.total, numbers.rates[self.name])
                _add(terms, {"loss": losses.total.detach(), **losses.parts})
            if self._norms is not None:
                self._norms.update(group, numbers.rates[self.name].ema_momentum)
            is_applied, after = self.engine.is_applied, self._state_beside()
            self._load_beside({k: torch.where(is_applied, after[k], before[k]) for k in after})
            counted = {k: torch.where(is_applied, value, 0.0) for k, value in terms.items()}
            _add(self._sums, {"applied": is_applied, **counted})
        self._num_steps += 1
        return Attempt(is_applied, terms)

    def _koleo_before(self, batch: StudentBatch, numbers: StepNumbers) -> KoleoGradient | None:
        """KoLeo of the slice where micro-batches cut its groups; None where each part computes its share of it."""
        if len(self._parts) == 1 or not numbers.scalars.objective.koleo:
            return None
        task = self.engine.module
        if not isinstance(task, DistillationTask):  # the objective of features has no KoLeo
            return None
        size, borders = task.options.koleo_group, [self.images[p].start for p in self._parts]
        if self.placement.koleo_is_local(size) and not any(b % size for b in borders):
            return None
        return task.koleo_before(batch, self._parts, numbers.scalars)

    @property
    def least_part(self) -> int:
        """Images of the smallest micro-batch with the same gradient: BatchNorm's groups are not cut, and under ZeRO 3, where weights are gathered in one order only, KoLeo's neither."""
        is_bound = self.engine.shards_weights and isinstance(self.engine.module, DistillationTask)
        return KOLEO_GROUP if is_bound or self._norms is not None else 1

    @property
    def largest_part(self) -> int:
        """Images of the largest micro-batch on this rank."""
        return max(len(self.images[part]) for part in self._parts)

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that train this network."""
        return self.engine.group

    @property
    def is_alone(self) -> bool:
        """This rank alone trains the network, so what it holds is all that is saved."""
        return dist.get_world_size(self.group) == 1

    def snapshot(self, into: Snapshot | None = None) -> Snapshot:
        """A copy in host memory of what this rank holds of the network; ``into`` is overwritten. No communication."""
        if self.is_alone:
            return Snapshot(self.state(into=None if into is None else into.state), [], {})
        engine = self.engine.snapshot(None if into is None else into.engine)
        return Snapshot({}, engine, {k: v.clone() for k, v in self._state_beside().items()})

    def judged_snapshot(self, into: Snapshot | None) -> tuple[Snapshot, bool]:
        """A snapshot, and whether what is in it and what the network computes with is finite, judged while it is copied: by the device, on a CPU by another thread.

        Waits for the device. No communication: a network that trains on this rank alone.
        """
        if next(self.engine.module.parameters()).device.type != "cpu":
            flag = self.is_finite_here()
            return self.snapshot(into), bool(flag)
        with ThreadPoolExecutor(1) as judge:
            found = judge.submit(self.is_finite_here)
            return self.snapshot(into), bool(found.result())

    def restore_snapshot(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot, on every rank of the group together. One all-gather per parameter group."""
        if self.is_alone:
            self.engine.restore_state(snapshot.state)
            self._load_beside(snapshot.state)
        else:
            self.engine.restore_snapshot(snapshot.engine)
            self._load_beside(snapshot.beside)

    def is_finite(self) -> bool:
        """All state of the network is finite. Waits for the device; one all-reduce over the group."""
        return self.engine.is_finite()

    def is_finite_here(self) -> Tensor:
        """The same of what this rank holds, on the device. No communication."""
        return self.engine.is_finite_here()

    def forget_step(self) -> None:
        """Counts the last step, which was skipped, no more: it is trained again. No communication."""
        self._num_steps -= 1

    def read_metrics(self, wait: float) -> dict[str, float] | None:
        """Means over the group and the steps that were applied since the last call: loss, its terms, ``wait``; and gradient norm, steps skipped. One sync, one all-reduce.

        None when there was no step; a loss of NaN when none was applied. Collective over the network's group.
        """
        if not self._num_steps:
            return None
        applied = self._sums.pop("applied")
        sums = torch.stack([*self._sums.values(), torch.full_like(applied, wait)])
        if dist.get_world_size(self.engine.group) > 1:
            dist.all_reduce(sums, group=self.engine.group)
            sums /= dist.get_world_size(self.engine.group)
        sums = torch.cat(
            [sums[:-1] / applied, sums[-1:], torch.stack([self.engine.grad_norm, applied])]
        )
        names = [*self._sums, "wait", "grad_norm", "skipped"]
        values = dict(zip(names, sums.tolist(), strict=True))
        values["skipped"] = self._num_steps - values["skipped"]
        self._sums, self._num_steps = {}, 0
        return values

    def steps_applied(self) -> int:
        """Returns how many steps made its state; skipped ones do not count. Waits for the device."""
        return self.engine.steps_applied()

    def ema(self, *, collect: bool = True) -> dict[str, Tensor]:
        """The average of the weights and running statistics by name, fp32 in host memory; nothing without ``collect``. Communication: gathers over its group."""
        weights = self.engine.full("ema", collect=collect)
        if self._norms is None or not collect:
            return weights
        return {**weights, **self._norms.averaged()}

    def state(
        self, *, collect: bool = True, into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Everything needed to go on, independent of the layout; parts of it without ``collect``. Communication and ``into`` as ``Engine.state``."""
        beside = {
            name: tensor.clone() if into is None else into[name].copy_(tensor)
            for name, tensor in self._state_beside().items()
        }
        return {**self.engine.state(collect=collect, into=into), **beside}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of ``state``, for any number of ranks. No communication."""
        self.engine.load_state(tensors)
        self._load_beside(tensors)

    def _state_beside(self) -> dict[str, Tensor]:
        """What is saved of this network beside its parameters, the same on every rank of the group."""
        targets = {TARGETS_PREFIX + name: each for name, each in self.targets.state().items()}
        return targets if self._norms is None else targets | self._norms.state()

    def _load_beside(self, tensors: Mapping[str, Tensor]) -> None:
        named = {name.removeprefix(TARGETS_PREFIX): each for name, each in tensors.items()}
        self.targets.load_state(named)
        if self._norms is not None:
            self._norms.load_state(tensors)


def _add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value.float()
