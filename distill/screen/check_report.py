"""What ``distill check`` prints: networks, device, images, lengths, estimated time and memory, and what to look at."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from distill.listing.passed_over import PassedOver
from distill.plan.copies import lacking_memory, late_stop
from distill.plan.flops import DEFAULT_DEVICE, Device
from distill.plan.here import THIS_CPU, device_here, estimate_basis, has_gpu_here
from distill.plan.job import JobPlan, main_plan
from distill.plan.memory import CONTEXT_GIB
from distill.plan.teacher_source import heads_story, teacher_shape
from distill.plan.warnings import find_warnings
from distill.recipe.keys import FamilyRecipe, Recipe, TeacherRecipe, is_ours
from distill.recipe.types import BUILTIN_PHOTOGRAPHS
from distill.screen.named_code import NamedCode
from distill.screen.words import duration

PROCESS_GIB = 0.7  # of a rank on a CPU before its first image: the interpreter and libraries
FP32_PARTS = ("teacher", "weights", "gradients", "activations", "buffers")  # planned in bf16


@dataclass(frozen=True)
class CheckReport:
    """A checked job as lines and as JSON; ``images`` are those found in each source."""

    recipe: Recipe
    teacher: TeacherRecipe | None
    num_ranks: int
    plans: Sequence[JobPlan]
    images: Mapping[str, int]
    code: Sequence[NamedCode]
    licence_warning: str | None = None
    passed_over: Mapping[str, PassedOver] = field(default_factory=dict)

    @cached_property
    def device(self) -> Device:
        """What each rank would have here."""
        return device_here(self.recipe.engine.device, self.num_ranks)

    @property
    def networks(self) -> list[str]:
        """Names of what is trained."""
        if isinstance(self.recipe, FamilyRecipe):
            return [student.label for student in self.recipe.students]
        return ["a teacher"]

    @cached_property
    def phases(self) -> list[dict[str, Any]]:
        """Name, steps, images per step, epochs (of all images found), seconds and GiB per rank of each part of the job."""
        factor = DEFAULT_DEVICE.seconds(1.0) / self.device.seconds(1.0)
        found = []
        for job in self.plans:
            is_here = self.teacher is None or is_ours(job.name)
            count = self._count(self.recipe if is_here else self.teacher)
            shown = job.num_steps * job.plan.images_global
            found.append(
                {
                    "phase": job.name,
                    "steps": job.num_steps,
                    "images_per_step": job.plan.images_global,
                    "epochs": round(shown / count, 2) if count else None,
                    "seconds": job.seconds / factor,
                    "memory_gib": round(self._gib(job), 2),
                }
            )
        return found

    @cached_property
    def warnings(self) -> list[str]:
        """What is legal and probably not meant."""
        shape = None
        if isinstance(self.recipe, FamilyRecipe) and self.plans:
            shape = teacher_shape(self.recipe, self.teacher)
        recipes = [each for each in (self.recipe, self.teacher) if each is not None]
        counts = [self._count(each) for each in recipes]
        here = [
            *self._of_machine(),
            *lacking_memory(self.recipe, self.plans, self.num_ranks, None),
            *self._late_stops(),
        ]
        if self.licence_warning is not None:
            here.append(self.licence_warning)
        return here + find_warnings(self.recipe, self.teacher, shape, counts)

    def lines(self) -> Iterator[str]:
        """The report for people."""
        yield from (named.describe() for named in self.code)
        recipe = self.recipe
        origin = f" from {self.teacher.name}" if self.teacher else ""
        yield f"{recipe.name}: {', '.join(self.networks)}{origin}"
        if isinstance(recipe, FamilyRecipe):
            yield f"  {heads_story(recipe)}"
        for source, count in self.images.items():
            yield f"  {source}: {count:,} images"
            if source in self.passed_over:
                yield from (f"    {line}" for line in self.passed_over[source].all_lines())
        for phase in self.phases:
            epochs = "" if phase["epochs"] is None else f", {phase['epochs']:,.3g} epochs"
            yield (
                f"  {phase['phase']}: {phase['steps']:,} steps of {phase['images_per_step']:,} images{epochs}, "
                f"about {_length(phase['seconds'])}, {phase['memory_gib']:.1f} GiB a rank"
            )
        if self.phases:
            total = _length(sum(phase["seconds"] for phase in self.phases))
            yield f"  about {total} in all ({estimate_basis(self.device)})"
        yield from (f"warning: {line}" for line in self.warnings)
        end = f"valid for {self.num_ranks} ranks on {self.device.name} (dry run)."
        if self.code:
            end = "valid as far as it shows without that code; --allow-code loads it and checks the rest."
        yield end

    def to_json(self) -> dict[str, Any]:
        """The same as data."""
        recipe = self.recipe
        return {
            "recipe": recipe.name,
            "networks": self.networks,
            "ranks": self.num_ranks,
            "device": self.device.name,
            "sources": dict(self.images),
            "besides": {path: each.to_json() for path, each in self.passed_over.items()},
            "heads": heads_story(recipe) if isinstance(recipe, FamilyRecipe) else None,
            "phases": self.phases,
            "estimate": estimate_basis(self.device),
            "warnings": self.warnings,
            "licence_warning": self.licence_warning,
            "code": [named.to_json() for named in self.code],
            "plan": main_plan(self.plans).to_json() if self.plans else None,
        }

    def _count(self, recipe: Recipe | None) -> int:
        """Images of a recipe's sources; 0 where it is not known: bundled photographs are cut into tiles."""
        paths = [] if recipe is None else [source.path for source in recipe.data.sources]
        is_known = all(path in self.images and path != BUILTIN_PHOTOGRAPHS for path in paths)
        return sum(self.images[path] for path in paths) if is_known else 0

    def _gib(self, job: JobPlan) -> float:
        """GiB of the fullest rank; a CPU has no CUDA context, and fp32 takes twice the bytes."""
        memory = job.footprint.fullest
        total = memory.total
        if self.recipe.engine.precision == "fp32":
            total += sum(getattr(memory, part) for part in FP32_PARTS)
        return total - CONTEXT_GIB + PROCESS_GIB if self.device.name == THIS_CPU else total

    def _of_machine(self) -> Iterator[str]:
        """What this machine lacks for the recipe."""
        wanted, cores = self.recipe.engine.device, len(os.sched_getaffinity(0))
        if wanted == "cuda" and not has_gpu_here():
            yield "engine.device = cuda: this machine has no such device; figures are those of an h100"
        elif self.device.name == THIS_CPU and self.num_ranks > cores:
            yield f"engine.processes = {self.num_ranks}: this machine has {cores} cores, which they share"
        gib = max((phase["memory_gib"] for phase in self.phases), default=0.0)
        if gib > self.device.memory_gib:
            yield f"{gib:.1f} GiB a rank: {self.device.name} has {self.device.memory_gib:.1f} for each of {self.num_ranks} ranks"

    def _late_stops(self) -> Iterator[str]:
        """Parts that cannot stop within ``checkpoint.grace``."""
        for job, phase in zip(self.plans, self.phases, strict=True):
            step_s = phase["seconds"] / phase["steps"]
            if line := late_stop(job, step_s, self.recipe.checkpoint.grace):
                yield line


def _length(seconds: float) -> str:
    days = seconds / 86_400
    return f"{days:,.1f} days" if days >= 1 else duration(seconds)
