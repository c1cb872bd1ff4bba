"""How good a run's features are: k-NN on held-out images, beside three that learned nothing.

    for each held-out image:
        the k most similar training images vote for their class
    score = mean over the classes of the fraction of their images voted right (balanced accuracy)

A score means little alone, so each stands beside the same vote on raw pixels, on the colour
statistics of the image, and on the class tokens of an untrained copy of the same network.

Similarities are computed in fp64: with LayerScale at its initial 1e-5 the class tokens of an
untrained ViT differ in the fourth digit only, and fp32 cosines of them are all 1. A large network on a GPU
multiplies in bf16 and adds its blocks up in fp32, which keeps that digit; the summary then has ``knn_in``.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from distill.export.classifiers import count_votes
from distill.protocols.images import ReadSplit
from distill.runfolder.status import KNN_K

BASELINE_PX = (
    64  # pixels are compared at this size: 12,288 numbers an image, whatever the images are
)
SIMILARITY_ROWS = 1024  # held-out images compared with all training images at once


def knn(
    train: Float[Tensor, "train width"],
    train_labels: Int64[Tensor, " train"],
    test: Float[Tensor, "test width"],
    test_labels: Int64[Tensor, " test"],
    k: int = KNN_K,
    *,
    measure: Literal["cosine", "euclidean"] = "cosine",
) -> float:
    """Balanced accuracy of the majority among the ``k`` most similar training images.

    A tie between classes goes to the one whose voters are more similar in sum. Classes without a
    held-out image do not count. Computed in fp64. No communication.

    Raises:
        ValueError: fewer than ``k`` training images, or no held-out image.
    """
    if len(train) < k:
        raise ValueError(f"k = {k}: must be at most the number of training images, {len(train)}")
    if not len(test):
        raise ValueError("no held-out image to score")
    return balanced_accuracy(knn_votes(train, train_labels, test, k, measure=measure), test_labels)


def knn_votes(
    train: Float[Tensor, "train width"],
    train_labels: Int64[Tensor, " train"],
    test: Float[Tensor, "test width"],
    k: int,
    *,
    measure: Literal["cosine", "euclidean"] = "cosine",
) -> Int64[Tensor, " test"]:
    """The class that each held-out image is given, as ``knn``."""
    num_classes = int(train_labels.max()) + 1
    train, test = train.double(), test.double()
    if measure == "cosine":
        train, test = (torch.nn.functional.normalize(rows, dim=1) for rows in (train, test))
    predicted = []
    for rows in torch.split(test, SIMILARITY_ROWS):
        similarity = rows @ train.T if measure == "cosine" else -torch.cdist(rows, train)
        nearest, index = similarity.topk(k, dim=1)
        votes, support = count_votes(nearest, train_labels[index], num_classes)
        has_most = votes == votes.amax(1, keepdim=True)
        predicted.append(support.masked_fill(~has_most, -torch.inf).argmax(1))
    return torch.cat(predicted)


def balanced_accuracy(
    predicted: Int64[Tensor, " images"], labels: Int64[Tensor, " images"]
) -> float:
    """Mean over the classes that occur in ``labels`` of the fraction predicted right."""
    num_classes = int(torch.maximum(predicted, labels).max()) + 1
    right = torch.bincount(labels[predicted == labels], minlength=num_classes).double()
    total = torch.bincount(labels, minlength=num_classes).double()
    occurs = total > 0
    return float((right[occurs] / total[occurs]).mean())


def pixel_rows(train: ReadSplit, test: ReadSplit) -> tuple[Tensor, Tensor]:
    """The images themselves as rows, at most 64 px on a side, for k-NN by Euclidean distance.

    Euclidean suits pixels better than cosine (0.38 against 0.22 on the bundled tiles), and a
    baseline is given its better distance.
    """
    known, query = (each.pixels.flatten(1).float() for each in (train, test))
    return known, query


def colour_rows(train: ReadSplit, test: ReadSplit) -> tuple[Tensor, Tensor]:
    """Each image's mean and spread of red, green and blue, for k-NN by Euclidean distance.

    The six numbers are standardised by the training images.
    """
    sides = [rgb_stats(each.pixels) for each in (train, test)]
    centre, spread = sides[0].mean(0), sides[0].std(0).clamp_min(1e-6)  # fp32; grey images exist
    known, query = ((side - centre) / spread for side in sides)
    return known, query


def rgb_stats(images: UInt8[Tensor, "images 3 height width"]) -> Float[Tensor, "images 6"]:
    """Mean and standard deviation of each colour of each image, in fp32."""
    values = images.flatten(2).float()  # [images, 3, height * width]
    return torch.cat([values.mean(2), values.std(2, correction=0)], dim=1)
