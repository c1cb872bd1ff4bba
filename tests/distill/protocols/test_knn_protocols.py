import numpy as np
import pytest
import torch

from distill.protocols.knn_protocols import TEMPERATURE, score_knn, weighted_votes
from distill.protocols.score import CannotScoreError
from tests.support.samples import overlapping


@pytest.mark.parametrize("k", [1, 10, 100])
def test_weighted_votes__equal_those_of_scikit_learn(k: int) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    given = overlapping(150, "dinov3")
    known, query = (
        torch.nn.functional.normalize(part.class_token.double(), dim=1).numpy()
        for part in (given.train, given.test)
    )

    def weigh(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / TEMPERATURE)

    model = KNeighborsClassifier(k, weights=weigh, metric="cosine", algorithm="brute")
    expected = model.fit(known, given.train_labels.numpy()).predict(query)
    votes = weighted_votes(given.train.class_token, given.train_labels, given.test.class_token, k)
    np.testing.assert_array_equal(votes.numpy(), expected)


def test_score_knn__reports_the_best_k_and_all_of_them() -> None:
    given = overlapping(150, "dinov3")
    score = score_knn(given)
    assert (score.protocol, score.task) == ("dinov3", "knn")
    assert score.settings["by_k"].keys() == {"10", "20", "100"}  # 200 are not there
    assert score.value == max(score.settings["by_k"].values())
    assert score.value == score.settings["by_k"][str(score.settings["k"])]
    assert score.interval is not None and score.interval[0] < score.value < score.interval[1]


def test_score_knn__too_few_images() -> None:
    with pytest.raises(CannotScoreError, match=r"9 training images are too few .* k = 10"):
        score_knn(overlapping(9, "dinov3"))
    with pytest.raises(CannotScoreError, match=r"3 training images are too few .* k = 5"):
        score_knn(overlapping(3, "quick"))


def test_score_knn__quick_is_the_score_of_before() -> None:
    from distill.protocols.knn import knn

    given = overlapping(90, "quick")
    expected = knn(
        given.train.class_token, given.train_labels, given.test.class_token, given.test_labels
    )
    assert score_knn(given).value == expected
