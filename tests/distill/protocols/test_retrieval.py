import pytest
import torch

from distill.protocols.retrieval import average_precision, score_retrieval
from distill.protocols.score import CannotScoreError, Sample
from tests.support.samples import overlapping


def test_average_precision__equals_scikit_learn_and_the_definition() -> None:
    from sklearn.metrics import average_precision_score

    random = torch.Generator().manual_seed(0)
    similarity = torch.randn(20, 30, generator=random, dtype=torch.float64)
    is_relevant = torch.rand(20, 30, generator=random) < 0.3
    found = average_precision(similarity, is_relevant)
    for row in range(20):
        expected = average_precision_score(is_relevant[row].numpy(), similarity[row].numpy())
        assert float(found[row]) == pytest.approx(expected, abs=1e-12)
        order = sorted(range(30), key=lambda i: -float(similarity[row, i]))
        hits, total = 0, 0.0
        for rank, image in enumerate(order, start=1):
            if is_relevant[row, image]:
                hits += 1
                total += hits / rank
        assert float(found[row]) == pytest.approx(total / hits, abs=1e-12)


def test_score_retrieval__is_the_mean_over_queries_that_have_an_answer() -> None:
    given = overlapping(90, "quick")
    lonely = given.test_labels.clone()
    lonely[0] = 7
    score = score_retrieval(Sample(given.train, given.train_labels, given.test, lonely))
    assert score.settings["queries"] == 59 and score.settings["gallery"] == 90
    assert score.interval is not None and score.interval[0] < score.value < score.interval[1]
    with pytest.raises(CannotScoreError, match="no held-out image has a training image"):
        score_retrieval(Sample(given.train, given.train_labels, given.test, lonely * 0 + 9))
