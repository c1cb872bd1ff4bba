"""Teacher features that are not finite: which rank produced them, whose fault that is, and the same rows computed once more.

    one rank's, once                  computed by the ranks that received them; the step is trained again
    one rank's, twice                 the job ends and names rank and host
    every rank's that computed them   the job ends and names the teacher's weights

Every rank of a family holds the frozen teacher and the crops that it trains on, so a rank that received a
bad row can compute it without communication, to the bits that should have come. An EMA that teaches has
moved on by the time that the fault is known: its step stays skipped, and what all ranks see is the fault
of the network in training, not a rank's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from distill.errors import RankError, UserError
from distill.runfolder.failure import LOST_EXIT_CODE
from distill.runfolder.heartbeat import read_records
from distill.train.phase import Phase, Teacher, Trainer
from distill.train.student import Attempt
from teacher.batch import CropBatch, PatchMasks, StudentBatch


@dataclass(frozen=True)
class PendingStep:
    """A step whose flag is on its way, what to look for a cause in, and what to train it again with."""

    attempt: Attempt
    batch: StudentBatch
    phase_step: int


@dataclass(frozen=True)
class Cause:
    """Why a step was skipped, the same on every rank of the group.

    ``producers``: world ranks whose features are not finite. ``bad_teachers``: ranks of the group whose
    teacher has weights that are not. ``term``: of the loss; empty where all are finite.
    """

    producers: frozenset[int]
    bad_teachers: frozenset[int]
    has_bad_weights: bool
    term: str

    def describe(self) -> str:
        """For the line about the skipped step."""
        if self.has_bad_weights:
            return "its weights are not finite"
        if self.producers:
            return f"the targets of rank {min(self.producers)} are not finite"
        return f"its {self.term} loss is not finite" if self.term else "a gradient is not finite"


class Producers:
    """The ranks that teach in one phase."""

    def __init__(self, phase: Phase, run_folder: Path, teacher_source: str) -> None:
        """``teacher_source``: what to name where every rank's features are not finite."""
        self._phase, self._run_folder, self._teacher_source = phase, run_folder, teacher_source

    def find_cause(self, trainer: Trainer, last: PendingStep) -> Cause:
        """What was not finite, found by any rank of the group. Waits for the device; one all-reduce over the group."""
        terms, num_ranks = last.attempt.terms, self._phase.plan.num_ranks
        names = sorted(terms)
        bad_terms = [not bool(terms[name].isfinite().all()) for name in names]
        found = torch.zeros(2 * num_ranks + 2, dtype=torch.int64)
        found[self._producers_of(last, _bad_images(last.batch))] = 1
        found[num_ranks + self._phase.world_rank] = not self._phase.teacher.is_finite_here()
        found[-2] = not trainer.is_finite_here()
        found[-1] = 1 + bad_terms.index(True) if any(bad_terms) else 0
        *flags, has_bad_weights, term = _over_group(trainer, last, found)
        return Cause(
            frozenset(rank for rank in range(num_ranks) if flags[rank]),
            frozenset(rank for rank in range(num_ranks) if flags[num_ranks + rank]),
            bool(has_bad_weights),
            names[term - 1] if term else "",
        )

    def is_to_repeat(self, blamed: set[int], cause: Cause, phase_step: int) -> bool:
        """Whether a skipped step was a producer's fault that can be made good. ``blamed``: of earlier steps; the producers are added.

        Raises:
            RankError: it was that rank before, or to compute once more cannot help.
        """
        is_frozen, step = self._phase.has_frozen_teacher, self._step(phase_step)
        if is_frozen and cause.bad_teachers:
            rank = min(cause.bad_teachers)
            raise _rank_error(f"{self._who(rank)}: its copy of the teacher is not finite, {step}")
        is_everyones = self._are_all(cause.producers, phase_step)
        is_networks = not is_frozen and (cause.has_bad_weights or is_everyones)
        if not cause.producers or is_networks:
            return False
        if is_frozen and self._phase.plan.is_teacher_sharded:
            who = "every rank" if is_everyones else self._who(min(cause.producers))
            raise _rank_error(f"{who}: features of the sharded teacher are not finite, {step}")
        again = blamed & cause.producers
        if again:
            text = "its teacher features are not finite, for the second time"
            raise _rank_error(f"{self._who(min(again))}: {text}, {step}")
        blamed |= cause.producers
        return is_frozen

    def recompute(self, trainer: Trainer, last: PendingStep, cause: Cause) -> StudentBatch:
        """The batch of a step, its bad features computed by this rank's teacher. One all-reduce over the group.

        Raises:
            RankError: features are not finite on one rank only.
            UserError: they are on all that computed them: the weights, or the images, are to blame.
        """
        batch, bad = last.batch, _bad_images(last.batch)
        if bad:
            batch = _recompute_here(self._phase.teacher, batch, bad)
        left, here = _bad_images(batch), self._phase.world_rank
        found = torch.zeros(self._phase.plan.num_ranks + 2, dtype=torch.int64)
        found[here] = bool(left)
        found[-2] = any(rank != here for rank in self._producers_of(last, left))
        found[-1] = len(left) < len(bad)
        *flags, is_bad_elsewhere, is_good_somewhere = _over_group(trainer, last, found)
        if not any(flags):
            return batch
        step = self._step(last.phase_step)
        is_everyones = is_bad_elsewhere or self._are_all(cause.producers, last.phase_step)
        if is_good_somewhere or not is_everyones:
            text = f"its features of {self._teacher_source} are not finite, computed twice"
            raise _rank_error(f"{self._who(flags.index(1))}: {text}, {step}")
        raise UserError(
            f"{self._teacher_source}: the features of this teacher are not finite on any rank, {step}",
            fix="Give weights whose features are finite in engine.precision (with a single rank its device may be to "
            "blame). Nothing is parked: the same command goes on; --fresh begins anew with other weights.",
            exit_code=LOST_EXIT_CODE,
        )

    def describe(self, cause: Cause, phase_step: int) -> Iterator[str]:
        """A line for every rank whose features were computed once more."""
        for rank in sorted(cause.producers):
            yield (
                f"{self._who(rank)}: its teacher features of {self._step(phase_step)} were not finite and were "
                "computed once more where they are needed; a second time ends the job"
            )

    def _producers_of(self, last: PendingStep, images: Sequence[int]) -> list[int]:
        """The rank that computed the features of each of some images of the slice."""
        run_step = self._phase.first_step + last.phase_step
        borders = self._phase.plan_schedule.at(run_step).share_borders(run_step)
        positions = last.batch.start + np.asarray(images, np.int64)
        ranks: list[int] = (np.searchsorted(borders, positions, side="right") - 1).tolist()
        return ranks

    def _are_all(self, ranks: frozenset[int], phase_step: int) -> bool:
        """No other rank has a share of that step. One of several ranks is not all, where the others have none."""
        run_step = self._phase.first_step + phase_step
        shares = self._phase.plan_schedule.at(run_step).shares(run_step)
        sharing = {rank for rank, share in enumerate(shares) if len(share)}
        return ranks >= sharing and (len(ranks) > 1 or len(shares) == 1)

    def _who(self, rank: int) -> str:
        """A rank and its host, for people."""
        records = read_records(self._run_folder, self._phase.plan.num_ranks)
        host = next((record.host for record in records if record.world_rank == rank), "")
        return f"rank {rank} on {host}" if host else f"rank {rank}"

    def _step(self, phase_step: int) -> str:
        return f"{self._phase.name} step {phase_step}"


def _bad_images(batch: StudentBatch) -> list[int]:
    """The images of a slice whose features are not finite, by their numbers in it."""
    targets = batch.targets
    bad = ~targets.class_features.flatten(1).isfinite().all(dim=1)
    if targets.anchor_patches is not None:
        bad |= ~targets.anchor_patches.flatten(1).isfinite().all(dim=1)
    images = torch.repeat_interleave(
        torch.arange(len(bad), device=bad.device),
        torch.tensor(batch.masks.counts, device=bad.device),
    )
    bad[images[~targets.patch_features.isfinite().all(dim=1)]] = True
    numbers: list[int] = torch.nonzero(bad).flatten().tolist()
    return numbers


def _recompute_here(teacher: Teacher, batch: StudentBatch, images: Sequence[int]) -> StudentBatch:
    """The batch with the features of some of its images computed by this rank's teacher."""
    crops, masks, targets, stats = batch.crops, batch.masks, batch.targets, batch.crops.pixel_stats
    device = targets.class_features.device
    some = torch.tensor(images, device=device)
    spans = [masks.masked(slice(image, image + 1)) for image in images]
    rows = [row for span in spans for row in range(span.start, span.stop)]
    pixel_stats = None if stats is None else stats[some]
    rows_here = teacher.teach(
        CropBatch(crops.global_crops[some], crops.local_crops[some], pixel_stats=pixel_stats),
        PatchMasks(masks.flags[some], tuple(masks.counts[image] for image in images)),
    )
    class_features, patch_features = targets.class_features.clone(), targets.patch_features.clone()
    class_features[some] = rows_here.class_features
    patch_features[torch.tensor(rows, dtype=torch.int64, device=device)] = rows_here.patch_features
    both = replace(targets, class_features=class_features, patch_features=patch_features)
    return replace(batch, targets=both)


def _over_group(trainer: Trainer, last: PendingStep, found: torch.Tensor) -> list[int]:
    """The largest of every number over the ranks of the group."""
    found = found.to(last.attempt.is_applied.device)
    if dist.get_world_size(trainer.group) > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=trainer.group)
    numbers: list[int] = found.tolist()
    return numbers


def _rank_error(message: str) -> RankError:
    fix = (
        "Look at that host's device and memory, or leave it out. Nothing is parked: the same command goes on "
        "from the last checkpoint; --max-restarts N does so by itself."
    )
    return RankError(message, fix=fix)
