"""k-NN by two protocols.

    quick    k = 5, majority vote, balanced accuracy: ``distill.protocols.knn``
    dinov3   k = 10, 20, 100 and 200, each neighbour votes by exp(cosine / 0.07), accuracy over images, the best k

Both compare features of length 1. The published protocol takes the centre 224 of a picture whose shorter side is
resized to 256; here images are resized to the network's side without a crop, which the settings name.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from distill.export.classifiers import count_votes
from distill.protocols.knn import SIMILARITY_ROWS, balanced_accuracy, knn_votes
from distill.protocols.score import CannotScoreError, Sample, Score, bootstrap, interval_of
from distill.runfolder.status import KNN_K

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
INPUT = {"features": "class token", "resize": "to the side, no crop"}


def score_knn(sample: Sample) -> Score:
    """The score by the sample's protocol, with an interval over held-out images.

    Raises:
        CannotScoreError: there are fewer training images than the smallest k.
    """
    count = len(sample.train_labels)
    least = KNN_K if sample.protocol == "quick" else KS[0]
    if count < least:
        raise CannotScoreError(f"{count} training images are too few for k-NN with k = {least}")
    known, query = sample.train.class_token, sample.test.class_token
    if sample.protocol == "quick":
        votes = knn_votes(known, sample.train_labels, query, KNN_K)
        scores = bootstrap(votes == sample.test_labels, sample.test_labels)
        value = balanced_accuracy(votes, sample.test_labels)
        settings = {"k": KNN_K, "average": "classes", **INPUT}
        return Score("knn", "quick", value, interval_of(scores), settings)
    by_k = {
        k: weighted_votes(known, sample.train_labels, query, k) == sample.test_labels
        for k in KS
        if k <= count
    }
    values = {k: float(right.double().mean()) for k, right in by_k.items()}
    best = max(values, key=lambda k: values[k])
    settings = {
        "k": best,
        "by_k": {str(k): value for k, value in values.items()},
        "temperature": TEMPERATURE,
        "average": "images",
        **INPUT,
    }
    interval = interval_of(bootstrap(by_k[best], sample.test_labels, "images"))
    return Score("knn", "dinov3", values[best], interval, settings)


def weighted_votes(
    train: Float[Tensor, "train width"],
    train_labels: Int64[Tensor, " train"],
    test: Float[Tensor, "test width"],
    k: int,
) -> Int64[Tensor, " test"]:
    """The class with the largest sum of exp(cosine / T) among the ``k`` nearest; in fp64."""
    num_classes = int(train_labels.max()) + 1
    known = normalize(train.double(), dim=1)
    predicted = []
    for rows in normalize(test.double(), dim=1).split(SIMILARITY_ROWS):
        nearest, index = (rows @ known.T).topk(k, dim=1)
        weights = torch.softmax(nearest / TEMPERATURE, dim=1)
        predicted.append(count_votes(weights, train_labels[index], num_classes)[1].argmax(1))
    return torch.cat(predicted)
