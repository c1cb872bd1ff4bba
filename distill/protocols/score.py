"""What a task gives, what it is given, and the interval that held-out images leave open."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from distill.protocols.images import Extracted

Protocol = Literal["quick", "dinov3"]
PROTOCOLS: tuple[str, ...] = get_args(Protocol)
RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0


class CannotScoreError(ValueError):
    """These images give no score of a task; the text is the reason, in one line."""


@dataclass(frozen=True)
class Sample:
    """Features of one network and labels of the same images, training and held-out, and the protocol to follow."""

    train: Extracted
    train_labels: Int64[Tensor, " train"]
    test: Extracted
    test_labels: Int64[Tensor, " test"]
    protocol: Protocol = "quick"


@dataclass(frozen=True)
class Score:
    """One figure of one network. ``protocol``: the name that is printed beside it; ``settings``: what it stands for."""

    task: str
    protocol: str
    value: float
    interval: tuple[float, float] | None
    settings: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As ``summary.json`` holds it."""
        interval = None if self.interval is None else list(self.interval)
        return {
            "protocol": self.protocol,
            "value": self.value,
            "interval": interval,
            "settings": dict(self.settings),
        }


Average = Literal["images", "classes"]


def bootstrap(
    right: Bool[Tensor, " images"] | Float[Tensor, " images"],
    labels: Int64[Tensor, " images"],
    average: Average = "classes",
    *,
    resamples: int = RESAMPLES,
) -> Float64[Tensor, " resamples"]:
    """The score of as many held-out images, drawn again with replacement, once per resample.

    ``average``: over images, or over the classes that occur in the resample. The draws are the same for all
    networks, so that the difference of two is that of a pair.
    """
    random = torch.Generator().manual_seed(SEED)
    count, classes = len(labels), int(labels.max()) + 1
    scores = []
    for _ in range(resamples):
        drawn = torch.randint(count, (count,), generator=random)
        if average == "images":
            scores.append(right[drawn].double().mean())
            continue
        total = torch.bincount(labels[drawn], minlength=classes).double()
        good = torch.bincount(labels[drawn], weights=right[drawn].double(), minlength=classes)
        occurs = total > 0
        scores.append((good[occurs] / total[occurs]).mean())
    return torch.stack(scores)


def bootstrap_sums(
    rows: Float64[Tensor, "images figures"],
    score: Callable[[Float64[Tensor, "resamples figures"]], Float64[Tensor, " resamples"]],
) -> Float64[Tensor, " resamples"]:
    """A score of sums over images, of as many images drawn again with replacement, once per resample."""
    random = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(len(rows), (RESAMPLES, len(rows)), generator=random)
    counts = torch.zeros(RESAMPLES, len(rows), dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return score(counts @ rows)


def interval_of(scores: Float64[Tensor, " resamples"]) -> tuple[float, float]:
    """The middle ``CONFIDENCE`` of some scores."""
    tail = (1 - CONFIDENCE) / 2
    low, high = scores.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def mean_interval(scores: Float64[Tensor, " draws"]) -> tuple[float, float]:
    """Of the mean of some draws, by Student's t; the mean alone of one draw."""
    from scipy.stats import t

    if len(scores) < 2:
        return float(scores[0]), float(scores[0])
    half = t.ppf((1 + CONFIDENCE) / 2, len(scores) - 1) * float(scores.std()) / len(scores) ** 0.5
    return float(scores.mean()) - half, float(scores.mean()) + half


Run = Callable[[Sample], Score]
