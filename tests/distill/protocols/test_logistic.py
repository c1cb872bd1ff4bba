import numpy as np
import pytest
import torch

from distill.protocols.logistic import SETTINGS, choice_part, score_logistic
from distill.protocols.score import CannotScoreError
from tests.support.samples import overlapping


def test_score_logistic__equals_scikit_learn_on_the_same_features() -> None:
    from sklearn.linear_model import LogisticRegression

    given = overlapping(120, "quick")
    score = score_logistic(given)
    known, query = (part.class_token.double().numpy() for part in (given.train, given.test))
    labels, is_choice = given.train_labels.numpy(), choice_part(given.train_labels).numpy()
    by_strength = {}
    for strength in SETTINGS["quick"]["strengths"]:
        model = LogisticRegression(C=strength, max_iter=200)
        model.fit(known[~is_choice], labels[~is_choice])
        by_strength[strength] = model.score(known[is_choice], labels[is_choice])
    best = max(by_strength, key=lambda strength: by_strength[strength])
    model = LogisticRegression(C=best, max_iter=200).fit(known, labels)
    assert score.settings["C"] == best and score.settings["is_converged"]
    assert score.value == pytest.approx(model.score(query, given.test_labels.numpy()), abs=1e-12)
    assert score.interval is not None and score.interval[0] < score.value < score.interval[1]


def test_score_logistic__the_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """45 values of C, 1e-6 to 1e5, to 1e-12; one that does not get there is named."""
    strengths = SETTINGS["dinov3"]["strengths"]
    assert (len(strengths), strengths[0]) == (45, 1e-6) and np.isclose(strengths[-1], 1e5)
    assert (SETTINGS["dinov3"]["tol"], SETTINGS["dinov3"]["max_iter"]) == (1e-12, 1000)
    monkeypatch.setitem(SETTINGS["dinov3"], "max_iter", 3)
    score = score_logistic(overlapping(40, "dinov3"))
    assert score.protocol == "dinov3" and score.settings["of"] == 45
    assert not score.settings["is_converged"]


def test_choice_part__is_a_tenth_of_each_class() -> None:
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 2 + [3])
    chosen = choice_part(labels)
    assert torch.bincount(labels[chosen], minlength=4).tolist() == [4, 2, 1, 0]
    with pytest.raises(CannotScoreError, match="two classes"):
        choice_part(torch.tensor([0, 0, 0, 1]))
