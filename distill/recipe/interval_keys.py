"""The keys of what happens at intervals: saving, and scoring beside training."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from distill.listing.document import Loc, Problem
from distill.recipe.types import Every, Section, machine


class CheckpointSpec(Section):
    """How often to save ("30min" or a number of steps) and how many to keep."""

    every: Every = machine(
        "5min",
        description="Time or steps between two checkpoints, such as `30min` or 500. The default loses five minutes at most.",
    )
    keep: int = machine(
        3,
        ge=1,
        description="How many of the newest checkpoints stay on disk. The default survives two damaged ones.",
    )
    milestones: int | None = machine(
        None,
        ge=1,
        description="Steps of a phase between checkpoints that are never removed. Null means none.",
    )
    grace: int | None = machine(
        None,
        since=3,
        ge=1,
        le=65535,
        description="Seconds from SIGTERM to SIGKILL that the site gives: `distill launch` asks for them, `check` warns where a stop takes longer. Null: 300, and no warning.",
    )
    peer: bool = machine(
        False,
        since=2,
        description="Copy the state into memory (/dev/shm) of two nodes; it takes four checkpoints there.",
    )
    peer_every: int = machine(
        50,
        since=2,
        ge=1,
        description="Steps that are lost at most: copies are so far apart, less the steps that one takes until it is complete, but never nearer than half of it.",
    )
    export: bool = machine(
        False,
        since=2,
        description="Write every student of a milestone as a folder with its scores, `milestones/family-STEP/NAME`, in a process beside training.",
    )

    @property
    def every_steps(self) -> int | None:
        """Steps between saves, if counted in steps."""
        return self.every if isinstance(self.every, int) else None

    @property
    def every_s(self) -> float | None:
        """Seconds between saves, if counted in time."""
        return None if isinstance(self.every, int) else _seconds(self.every)


class EvaluateSpec(Section):
    """Scores of the students while they train."""

    every: Every | None = machine(
        None,
        description="Time or steps between two scorings of the students beside training, such as `30min` or 500; each saves a checkpoint. Null means none: scoring takes time of a CPU core.",
    )

    @property
    def every_steps(self) -> int | None:
        """Steps between scorings, if counted in steps."""
        return self.every if isinstance(self.every, int) else None

    @property
    def every_s(self) -> float | None:
        """Seconds between scorings, if counted in time."""
        return _seconds(self.every) if isinstance(self.every, str) else None


def _seconds(text: str) -> float:
    """Of a duration that was validated."""
    number, unit = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", text).groups()  # type: ignore[union-attr]
    return float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def export_problems(parts: Mapping[Loc, Any]) -> Iterator[Problem]:
    """What ``checkpoint.export`` lacks; ``parts`` are the values of a recipe by their place."""
    if not parts.get(("checkpoint", "export")):
        return
    if any(loc[0] == "model" for loc in parts):
        yield ("checkpoint", "export"), "true: a recipe of a teacher has no students to export"
    elif parts.get(("checkpoint", "milestones"), 0) is None:
        yield (
            ("checkpoint", "export"),
            "true: write checkpoint.milestones too, the steps between exports",
        )
