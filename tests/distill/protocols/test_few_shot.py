import torch

from distill.protocols.few_shot import pick_shots, score_few_shot
from distill.protocols.knn_protocols import weighted_votes
from tests.support.samples import overlapping


def test_pick_shots__as_many_of_each_class_as_there_are() -> None:
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    drawn = pick_shots(labels, 4, 0)
    assert torch.bincount(labels[drawn]).tolist() == [4, 3, 1]
    assert len(drawn.unique()) == len(drawn)
    assert not torch.equal(drawn, pick_shots(labels, 4, 1))


def test_score_few_shot__is_the_mean_of_its_draws() -> None:
    given = overlapping(90, "quick")
    score = score_few_shot(given)
    values = []
    for seed in range(10):
        drawn = pick_shots(given.train_labels, 5, seed)
        known, labels = given.train.class_token[drawn], given.train_labels[drawn]
        votes = weighted_votes(known, labels, given.test.class_token, 5)
        values.append(float((votes == given.test_labels).double().mean()))
    assert abs(score.value - sum(values) / 10) < 1e-6  # means in fp32
    assert score.interval is not None and score.interval[0] < score.value < score.interval[1]
    one, five = (score.settings["by_shots"][n]["value"] for n in ("1", "5"))
    assert one < five == score.value


def test_score_few_shot__more_shots_than_images_are_not_another_score() -> None:
    settings = score_few_shot(overlapping(9, "dinov3")).settings
    assert settings["by_shots"].keys() == {"1", "2"} and settings["draws"] == 5
