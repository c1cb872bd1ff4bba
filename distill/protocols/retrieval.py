"""Retrieval: each held-out image asks for the training images of its class, by cosine of class tokens.

    average precision   mean over the relevant images of (relevant ones up to it) / (images up to it)
    mAP                 mean over the held-out images whose class has a training image

Equal cosines keep the order of the training images. The same for both protocols: there is nothing to choose. The
published figures are of landmarks (Oxford, Paris) at 224 px on the longer side; classes of a folder are another set.
"""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.nn.functional import normalize

from distill.protocols.knn import SIMILARITY_ROWS
from distill.protocols.score import CannotScoreError, Sample, Score, bootstrap, interval_of


def score_retrieval(sample: Sample) -> Score:
    """Mean average precision.

    Raises:
        CannotScoreError: no held-out image has a training image of its class.
    """
    is_query = torch.isin(sample.test_labels, sample.train_labels)
    if not is_query.any():
        raise CannotScoreError("no held-out image has a training image of its class")
    known = normalize(sample.train.class_token.double(), dim=1)
    query = normalize(sample.test.class_token[is_query].double(), dim=1)
    wanted, parts = sample.test_labels[is_query], []
    for rows, labels in zip(
        query.split(SIMILARITY_ROWS), wanted.split(SIMILARITY_ROWS), strict=True
    ):
        is_relevant = labels[:, None] == sample.train_labels[None]
        parts.append(average_precision(rows @ known.T, is_relevant))
    precisions = torch.cat(parts)
    interval = interval_of(bootstrap(precisions, wanted, "images"))
    settings = {
        "queries": len(wanted),
        "gallery": len(known),
        "measure": "cosine",
        "features": "class token",
    }
    value = float(precisions.mean())
    return Score("retrieval", sample.protocol, value, interval, settings)


def average_precision(
    similarity: Float[Tensor, "queries gallery"], is_relevant: Bool[Tensor, "queries gallery"]
) -> Float64[Tensor, " queries"]:
    """Of every query; each has a relevant image."""
    order = similarity.argsort(dim=1, descending=True, stable=True)
    hits = is_relevant.gather(1, order).double()
    ranks = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64)
    return (hits * hits.cumsum(1) / ranks).sum(1) / hits.sum(1)
