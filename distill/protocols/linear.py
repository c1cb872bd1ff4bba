"""Linear probe by SGD: momentum 0.9, no decay, cosine to 0, one linear layer per rate, all trained on the same batches.

    dinov3   13 rates from 1e-5 to 0.1, times batch / 256; 12,500 steps of 128 images
    quick    5 rates from 1e-3 to 10, times batch / 256; 1,000 steps of 128 images

The input is the class token and the mean of the patches, concatenated, as in the published code; the class token
alone, as in the published table, stands beside it. The rate is chosen on a tenth of the training images, which are
not trained on: the published one is chosen on the validation set. Features are computed once, so that there are no
random crops. Computed in fp32 on the CPU, with fixed seeds.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from distill.protocols.images import Extracted
from distill.protocols.logistic import choice_part
from distill.protocols.score import Protocol, Sample, Score, bootstrap, interval_of

BATCH = 128
MOMENTUM = 0.9
SEED = 0
RATES: dict[Protocol, tuple[float, ...]] = {
    "quick": (1e-3, 1e-2, 1e-1, 1.0, 10.0),
    "dinov3": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
}
STEPS: dict[Protocol, int] = {"quick": 1_000, "dinov3": 12_500}


def score_linear(sample: Sample) -> Score:
    """Accuracy over held-out images, of class token and mean patch.

    Raises:
        CannotScoreError: a class cannot be in both parts of the training images.
    """
    probe, alone = fit_probe(sample), fit_probe(sample, has_patches=False)
    right = probe.right
    settings = {
        "input": "class token + mean patch",
        "rate": probe.rate,
        "class token alone": float(alone.right.double().mean()),
        "its rate": alone.rate,
        "steps": STEPS[sample.protocol],
        "batch": BATCH,
        "average": "images",
    }
    interval = interval_of(bootstrap(right, sample.test_labels, "images"))
    return Score("linear", sample.protocol, float(right.double().mean()), interval, settings)


@dataclass(frozen=True)
class Probe:
    """The layer of the chosen rate, and which held-out images it gets right."""

    weight: Float[Tensor, "classes inputs"]
    bias: Float[Tensor, " classes"]
    rate: float
    right: Bool[Tensor, " test"]


def fit_probe(sample: Sample, *, has_patches: bool = True) -> Probe:
    """Trains a layer for each rate and takes the best; ``has_patches``: its input ends in the mean patch.

    Raises:
        CannotScoreError: a class cannot be in both parts of the training images.
    """
    is_choice = choice_part(sample.train_labels)

    def rows(found: Extracted) -> Float[Tensor, "images inputs"]:
        parts = [found.class_token, *([found.mean_patch] if has_patches else [])]
        return torch.cat(parts, dim=1).float()

    known, labels = rows(sample.train), sample.train_labels
    rates = RATES[sample.protocol]
    weights, biases = train_probes(
        known[~is_choice], labels[~is_choice], rates, STEPS[sample.protocol]
    )
    chosen = predict(weights, biases, known[is_choice]) == labels[is_choice]
    best = int(chosen.double().mean(1).argmax())  # the smallest of equals
    votes = predict(weights[best : best + 1], biases[best : best + 1], rows(sample.test))
    return Probe(weights[best], biases[best], rates[best], votes[0] == sample.test_labels)


def train_probes(
    features: Float[Tensor, "train inputs"],
    labels: Int64[Tensor, " train"],
    rates: tuple[float, ...],
    steps: int,
) -> tuple[Float[Tensor, "rates classes inputs"], Float[Tensor, "rates classes"]]:
    """A linear layer per rate, by SGD on the mean cross-entropy of each."""
    random = torch.Generator().manual_seed(SEED)
    num_classes = int(labels.max()) + 1
    start = 0.01 * torch.randn(num_classes, features.shape[1], generator=random)
    weights = start.expand(len(rates), -1, -1).clone()
    biases = torch.zeros(len(rates), num_classes)
    speed, bias_speed = torch.zeros_like(weights), torch.zeros_like(biases)
    peak = torch.tensor(rates) * BATCH / 256
    one_hot = torch.nn.functional.one_hot(labels, num_classes).float()
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(labels), generator=random)])
        batch, order = order[:BATCH], order[BATCH:]
        rows = features[batch]
        logits = torch.einsum("bi,rci->rbc", rows, weights) + biases[:, None]
        error = (logits.softmax(2) - one_hot[batch]) / BATCH  # of the cross-entropy
        speed.mul_(MOMENTUM).add_(torch.einsum("rbc,bi->rci", error, rows))
        bias_speed.mul_(MOMENTUM).add_(error.sum(1))
        now = peak * (0.5 + 0.5 * torch.cos(torch.tensor(torch.pi * step / steps)))
        weights.sub_(now[:, None, None] * speed)
        biases.sub_(now[:, None] * bias_speed)
    return weights.nan_to_num_(0.0), biases.nan_to_num_(0.0)


def predict(
    weights: Float[Tensor, "rates classes inputs"],
    biases: Float[Tensor, "rates classes"],
    features: Float[Tensor, "images inputs"],
) -> Int64[Tensor, "rates images"]:
    """The class with the largest value, by every layer."""
    logits = torch.einsum("bi,rci->rbc", features, weights) + biases[:, None]
    return logits.argmax(2)
