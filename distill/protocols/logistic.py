"""Logistic regression on class tokens, for small sets: scikit-learn's L-BFGS in fp64, the strength chosen on a part of train.

    dinov3   45 values of C from 1e-6 to 1e5, tolerance 1e-12, at most 1000 iterations
    quick    7 values of C from 1e-3 to 1e3, tolerance 1e-4, at most 200 iterations

C is the one with the best accuracy on a tenth of the training images, held back class by class; then all
training images are fitted with it. The smallest C counts where several are best.
"""

import warnings
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from distill.protocols.score import CannotScoreError, Sample, Score, bootstrap, interval_of

SEED = 0
CHOICE_FRACTION = 0.1
SMALL = 5_000_000  # numbers
SETTINGS: dict[str, dict[str, Any]] = {
    "dinov3": {"strengths": np.logspace(-6, 5, 45), "tol": 1e-12, "max_iter": 1000},
    "quick": {"strengths": np.logspace(-3, 3, 7), "tol": 1e-4, "max_iter": 200},
}


def score_logistic(sample: Sample) -> Score:
    """Accuracy over held-out images.

    Raises:
        CannotScoreError: a class cannot be in both parts of the training images.
    """
    how = SETTINGS[sample.protocol]
    features = sample.train.class_token.double().numpy()
    query = sample.test.class_token.double().numpy()
    labels = sample.train_labels.numpy()
    is_choice = choice_part(sample.train_labels).numpy()
    best, best_score = float(how["strengths"][0]), -1.0
    for strength in how["strengths"]:
        model = fit_logistic(features[~is_choice], labels[~is_choice], float(strength), how)
        score = float((model.predict(features[is_choice]) == labels[is_choice]).mean())
        if score > best_score:
            best, best_score = float(strength), score
    model = fit_logistic(features, labels, best, how)
    right = torch.from_numpy(model.predict(query)) == sample.test_labels
    settings = {
        "C": best,
        "of": len(how["strengths"]),
        "tol": how["tol"],
        "is_converged": bool(model.n_iter_.max() < how["max_iter"]),
        "average": "images",
        "features": "class token",
    }
    interval = interval_of(bootstrap(right, sample.test_labels, "images"))
    return Score("logistic", sample.protocol, float(right.double().mean()), interval, settings)


def fit_logistic(
    features: NDArray[np.float64], labels: NDArray[np.int64], strength: float, how: dict[str, Any]
) -> Any:
    """scikit-learn's model; one that stops at the most iterations is taken as it is."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    model = LogisticRegression(C=strength, tol=how["tol"], max_iter=how["max_iter"])
    limit = 1 if features.size < SMALL else None  # threads that wait for each other cost more
    with warnings.catch_warnings(), threadpool_limits(limit):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, labels)


def choice_part(labels: Tensor) -> Bool[Tensor, " images"]:
    """A tenth of each class, at least one image and at most all but one, by a fixed seed.

    Raises:
        CannotScoreError: fewer than two classes have two images.
    """
    random = torch.Generator().manual_seed(SEED)
    is_choice = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = torch.nonzero(labels == label).squeeze(1)
        if len(members) > 1:
            count = max(1, round(CHOICE_FRACTION * len(members)))
            is_choice[members[torch.randperm(len(members), generator=random)[:count]]] = True
    if len(labels[is_choice].unique()) < 2:
        raise CannotScoreError("two classes with at least two training images each are the least")
    return is_choice
