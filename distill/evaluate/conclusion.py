"""Scores in words: is a network better than what learned nothing, why, and what to do where it is not.

    a network is better than a floor   where the interval of the difference, over the same resampled held-out
                                       images, lies above 0
    floors                             its untrained copy, colours, raw pixels: the best of the three counts
    without labels                     mutual k-NN with the teacher against the same of the floors

A difference within its interval is called none that these images can show, whatever its sign.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Int64
from torch import Tensor

from distill.protocols.score import bootstrap, interval_of

FEW_IMAGES = 500  # held-out; below, intervals are about 0.1 wide


@dataclass(frozen=True)
class Conclusion:
    """What the scores mean, the figures behind it, and the next move; ``networks``: which is better than its floor."""

    text: str
    reason: str
    next: str
    networks: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """As ``summary.json`` holds it."""
        return {
            "text": self.text,
            "reason": self.reason,
            "next": self.next,
            "networks": {name: dict(entry) for name, entry in self.networks.items()},
        }


@dataclass(frozen=True)
class Voted:
    """Which held-out images a network or a baseline got right, and its score."""

    value: float
    right: Bool[Tensor, " images"]


def conclude_by_labels(
    networks: Mapping[str, Voted],
    untrained: Mapping[str, Voted],
    baselines: Mapping[str, Voted],
    labels: Int64[Tensor, " images"],
) -> Conclusion:
    """From k-NN scores on the same held-out images; the first network is the one that others are compared with."""
    scores = {each: bootstrap(vote.right, labels) for each, vote in baselines.items()}
    entries: dict[str, dict[str, Any]] = {}
    for name, vote in networks.items():
        floors = {**baselines, "its untrained copy": untrained[name]}
        floor = max(floors, key=lambda each: floors[each].value)
        low = scores[floor] if floor in scores else bootstrap(untrained[name].right, labels)
        interval = interval_of(bootstrap(vote.right, labels) - low)
        entries[name] = {
            "knn": vote.value,
            "floor": floor,
            "floor_knn": floors[floor].value,
            "difference": vote.value - floors[floor].value,
            "interval": list(interval),
            "is_better": interval[0] > 0,
        }
    better = [name for name, entry in entries.items() if entry["is_better"]]
    reason = "; ".join(
        f"{name} {entry['knn']:.3f} against {entry['floor_knn']:.3f} of {entry['floor']} "
        f"({entry['difference']:+.3f}, 95% {entry['interval'][0]:+.3f} to {entry['interval'][1]:+.3f})"
        for name, entry in entries.items()
    )
    reason = f"k-NN on {len(labels):,} held-out images: {reason}"
    text = _sentence(
        better, list(entries), "better than the best of colours, raw pixels and an untrained copy"
    )
    first = next(iter(entries))
    if first in better and len(entries) > 1:
        text += " " + _beside(networks, first, labels)
    return Conclusion(text, reason, _next_move(better, list(entries), len(labels)), entries)


def conclude_by_closeness(agreement: Mapping[str, Any]) -> Conclusion | None:
    """From mutual k-NN with the teacher, for images without labels; None where there are no students."""
    floors = {name: each["class"]["mutual_knn"] for name, each in agreement["floors"].items()}
    entries: dict[str, dict[str, Any]] = {}
    for name, each in agreement["networks"].items():
        if name == agreement["reference"]:
            continue
        mine = {**floors, "its untrained copy": each["untrained"]["class"]["mutual_knn"]}
        floor = max(mine, key=lambda key: mine[key])
        value = each["class"]["mutual_knn"]
        entries[name] = {
            "mutual_knn": value,
            "floor": floor,
            "floor_mutual_knn": mine[floor],
            "is_better": value > mine[floor],
        }
    if not entries:
        return None
    better = [name for name, entry in entries.items() if entry["is_better"]]
    reason = "; ".join(
        f"{name} shares {entry['mutual_knn']:.0%} of nearest neighbours with {agreement['reference']}, "
        f"{entry['floor']} {entry['floor_mutual_knn']:.0%}"
        for name, entry in entries.items()
    )
    text = _sentence(
        better,
        list(entries),
        f"nearer to {agreement['reference']} than colours, raw pixels and an untrained copy",
    )
    following = _next_move(better, list(entries), agreement["images"])
    return Conclusion(f"{text} Without labels this is not a score.", reason, following, entries)


def _sentence(better: Sequence[str], names: Sequence[str], than: str) -> str:
    others = [name for name in names if name not in better]
    if not better:
        return f"No network is {than}."
    if not others:
        return f"Every network is {than}."
    verb, other_verb = ("is" if len(each) == 1 else "are" for each in (better, others))
    return f"{', '.join(better)} {verb} {than}; {', '.join(others)} {other_verb} not."


def _beside(networks: Mapping[str, Voted], first: str, labels: Int64[Tensor, " images"]) -> str:
    """How the others compare with the first."""
    reference = bootstrap(networks[first].right, labels)
    parts: dict[str, list[str]] = {"below": [], "above": [], "level with": []}
    for name, vote in networks.items():
        if name != first:
            low, high = interval_of(bootstrap(vote.right, labels) - reference)
            word = "above" if low > 0 else "below" if high < 0 else "level with"
            parts[word].append(name)
    found = [f"{', '.join(names)} {word} {first}" for word, names in parts.items() if names]
    return f"As far as these images can show: {'; '.join(found)}."


def _next_move(better: Sequence[str], names: Sequence[str], num_images: int) -> str:
    if len(better) == len(names):
        return "Nothing to do; more tasks: distill eval RUN --tasks knn,logistic,fewshot,retrieval."
    few = (
        f" {num_images:,} images give wide intervals: hold out more."
        if num_images < FEW_IMAGES
        else ""
    )
    first = names[0]
    if first == "teacher" and first not in better:
        return (
            "Students cannot learn more than the teacher knows: train the teacher longer or on more images, "
            f"or take released weights, before the students.{few}"
        )
    return f"Train longer (schedule.steps) or on more images, and look at the losses: distill watch RUN.{few}"
