"""Measured seconds per image of a family's networks, which a plan takes in place of those that follow from FLOPs.

A device reaches another part of its peak with every network, so ranks that are divided by FLOPs wait for
the group that was given too few.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import PlanError

WRITERS = "distill bench RECIPE --json FILE.json, or distill plan RECIPE --json"


@dataclass(frozen=True)
class Costs:
    """Seconds per image: ``teach_s`` of the teacher, ``image_s`` of the training of each student by its label. ``source``: for messages."""

    teach_s: float
    image_s: Mapping[str, float]
    source: str

    def training_s(self, label: str) -> float:
        """Seconds per image of a student.

        Raises:
            PlanError: it was not measured.
        """
        if label not in self.image_s:
            raise PlanError(
                f"{self.source}: no seconds for students.{label}, only for {', '.join(self.image_s)}",
                fix="Measure this recipe again, or add the seconds of one image to image_s.",
            )
        return self.image_s[label]


def read_costs(path: Path) -> Costs:
    """Costs from JSON with ``teach_s`` and ``image_s`` as ``distill bench --json`` and ``distill plan --json`` write them.

    Raises:
        PlanError: not such a file.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"--costs {path}: {error}", fix=f"Write it with {WRITERS}.") from error
    costs = costs_of(facts, f"--costs {path}")
    if costs is None:
        text = (
            "has no teach_s with image_s, the seconds per image of the teacher and of each student"
        )
        raise PlanError(f"--costs {path}: {text}", fix=f"Write it with {WRITERS}.")
    return costs


def costs_of(facts: Any, source: str) -> Costs | None:
    """Costs from parsed JSON; None where it holds none, or a number that is no time."""
    if not isinstance(facts, dict) or not isinstance(facts.get("image_s"), dict):
        return None
    numbers = [facts.get("teach_s"), *facts["image_s"].values()]
    if not facts["image_s"] or not all(_is_time(each) for each in numbers):
        return None
    image_s = {str(name): float(each) for name, each in facts["image_s"].items()}
    return Costs(float(facts["teach_s"]), image_s, source)


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
