"""n-shot: k-NN with n training images of each class, drawn several times; the mean with an interval over the draws.

    quick    n = 1 and 5, ten draws, k = 5
    dinov3   n = 1, 2, 5 and 10, five draws, the best of k = 10, 20, 100 and 200

k is at most the number of images that were drawn. Votes are weighted as in the k-NN of that protocol
(``distill.protocols.knn_protocols``); a class with fewer images gives all it has. The value is that of the largest n.
"""

import torch
from jaxtyping import Int64
from torch import Tensor

from distill.protocols.knn_protocols import KS, weighted_votes
from distill.protocols.score import Protocol, Sample, Score, mean_interval
from distill.runfolder.status import KNN_K

SHOTS: dict[Protocol, tuple[int, ...]] = {"quick": (1, 5), "dinov3": (1, 2, 5, 10)}
DRAWS: dict[Protocol, int] = {"quick": 10, "dinov3": 5}
NEIGHBOURS: dict[Protocol, tuple[int, ...]] = {"quick": (KNN_K,), "dinov3": KS}


def score_few_shot(sample: Sample) -> Score:
    """Accuracy over held-out images at the largest n; ``by_shots`` has all."""
    protocol = sample.protocol
    most = int(torch.bincount(sample.train_labels).max())
    by_shots: dict[int, tuple[float, tuple[float, float]]] = {}
    for shots in SHOTS[protocol]:
        if shots > most and by_shots:
            break  # the same images as before
        values = torch.tensor([_once(sample, shots, seed) for seed in range(DRAWS[protocol])])
        by_shots[shots] = (float(values.double().mean()), mean_interval(values.double()))
    shots, (value, interval) = list(by_shots.items())[-1]
    settings = {
        "n": shots,
        "draws": DRAWS[protocol],
        "k": "best of " + ", ".join(map(str, KS)) if protocol == "dinov3" else KNN_K,
        "by_shots": {str(n): {"value": v, "interval": list(i)} for n, (v, i) in by_shots.items()},
        "average": "images",
        "features": "class token",
    }
    return Score("fewshot", protocol, value, interval, settings)


def _once(sample: Sample, shots: int, seed: int) -> float:
    drawn = pick_shots(sample.train_labels, shots, seed)
    known, labels = sample.train.class_token[drawn], sample.train_labels[drawn]
    ks = sorted({min(k, len(drawn)) for k in NEIGHBOURS[sample.protocol]})
    scores = [
        (weighted_votes(known, labels, sample.test.class_token, k) == sample.test_labels)
        for k in ks
    ]
    return max(float(right.double().mean()) for right in scores)


def pick_shots(labels: Int64[Tensor, " images"], shots: int, seed: int) -> Int64[Tensor, " drawn"]:
    """Positions of ``shots`` images of each class, or of all that a class has."""
    random = torch.Generator().manual_seed(seed)
    parts = []
    for label in labels.unique():
        members = torch.nonzero(labels == label).squeeze(1)
        parts.append(members[torch.randperm(len(members), generator=random)[:shots]])
    return torch.cat(parts)
