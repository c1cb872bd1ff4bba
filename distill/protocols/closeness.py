"""How near a network's features are to a teacher's, and how many directions they use. No labels.

    mutual k-NN      for each image: the fraction of its k nearest images that both networks agree on, averaged;
                     two networks that have nothing in common agree on k / (images - 1)
    linear CKA       |Y'X|^2 / (|X'X| |Y'Y|) of centred features, Frobenius norms
    mapped cosine    mean cosine between the teacher's centred features and the best linear map to them, which is
                     fitted by ridge regression on the even rows and compared on the odd ones
    effective rank   exp of the entropy of the singular values of the centred features, which sum up to 1

The first three are 1 for features that are a rotation of the teacher's, whatever their scale. A network without
training agrees with a teacher too, so each figure stands beside that of the untrained copy and of raw pixels. Everything is computed in fp64.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import normalize

MUTUAL_K = 10
FEWEST_IMAGES = 3 * MUTUAL_K  # below, chance alone agrees on a third of the neighbours
RIDGE = 1e-2  # of the mean squared length of a centred row
TINY = 1e-12  # of the largest eigenvalue: rounding of fp64


@dataclass(frozen=True)
class Closeness:
    """Figures of one network beside a teacher; ``effective_rank`` is of the network alone."""

    mutual_knn: float
    cka: float
    cosine: float
    effective_rank: float


def closeness(
    features: Float[Tensor, "images width"],
    teacher: Float[Tensor, "images teacher_width"],
    k: int = MUTUAL_K,
) -> Closeness:
    """All four figures of features of the same images, in the same order."""
    return Closeness(
        mutual_knn(features, teacher, k),
        linear_cka(features, teacher),
        mapped_cosine(features, teacher),
        effective_rank(features),
    )


def mutual_knn(
    one: Float[Tensor, "images width"],
    other: Float[Tensor, "images other_width"],
    k: int = MUTUAL_K,
) -> float:
    """Mean fraction of each image's ``k`` nearest other images, by cosine, that are the same in both.

    Raises:
        ValueError: there are no ``k`` other images.
    """
    if len(one) <= k:
        raise ValueError(f"k = {k}: must be below the number of images, {len(one)}")
    near = [_neighbours(each, k) for each in (one, other)]
    is_near = torch.zeros(len(one), len(one), dtype=torch.bool).scatter_(1, near[0], True)
    return float(is_near.gather(1, near[1]).double().mean())


def _neighbours(
    features: Float[Tensor, "images width"], k: int
) -> Int64[Tensor, "images neighbours"]:
    rows = normalize(features.double(), dim=1)
    similarity = (rows @ rows.T).fill_diagonal_(-torch.inf)
    return similarity.topk(k, dim=1).indices


def linear_cka(
    one: Float[Tensor, "images width"], other: Float[Tensor, "images other_width"]
) -> float:
    """Linear centred kernel alignment; 0 where one of the two is the same for all images."""
    x, y = _centred(one), _centred(other)
    if max(x.shape[1], y.shape[1]) > len(x):  # the same sums, by the smaller matrices
        x_gram, y_gram = x @ x.T, y @ y.T
        shared, norms = (x_gram * y_gram).sum(), x_gram.norm() * y_gram.norm()
    else:
        shared, norms = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    return float(shared / norms) if norms else 0.0


def mapped_cosine(
    features: Float[Tensor, "images width"], teacher: Float[Tensor, "images teacher_width"]
) -> float:
    """Mean cosine of the teacher's features and those that a linear map gives for the odd rows, fitted on the even ones.

    Both are centred by the mean of the even rows: without it what all images share would be the cosine.
    """
    known, query = _halves(features)
    wanted, true = _halves(teacher)
    gram = known @ known.T
    ridge = RIDGE * gram.diagonal().mean()
    if not ridge:
        return 0.0
    solved = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), wanted)
    return float(torch.cosine_similarity(query @ (known.T @ solved), true, dim=1).mean())


def effective_rank(features: Float[Tensor, "images width"]) -> float:
    """Between 1 and the width; 0 for features that are the same for all images."""
    rows = _centred(features)
    gram = rows @ rows.T if rows.shape[1] > len(rows) else rows.T @ rows
    squared = torch.linalg.eigvalsh(gram)
    largest = squared[-1].clamp_min(0)
    if not largest:
        return 0.0
    values = squared[squared > TINY * largest].sqrt()
    shares = values / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def _centred(features: Float[Tensor, "images width"]) -> Float64[Tensor, "images width"]:
    rows = features.double()
    return rows - rows.mean(0)


def _halves(
    features: Float[Tensor, "images width"],
) -> tuple[Float64[Tensor, "known width"], Float64[Tensor, "query width"]]:
    rows = features.double()
    centre = rows[::2].mean(0)
    return rows[::2] - centre, rows[1::2] - centre
