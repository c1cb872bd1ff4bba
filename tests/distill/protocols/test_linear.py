import math

import torch

from distill.protocols.linear import BATCH, MOMENTUM, predict, score_linear, train_probes
from tests.support.samples import overlapping


def test_train_probes__equal_torchs_sgd_rate_by_rate() -> None:
    given = overlapping(300, "quick")
    features, labels, rates, steps = given.train.class_token, given.train_labels, (0.1, 1.0), 25
    weights, biases = train_probes(features, labels, rates, steps)
    for turn, rate in enumerate(rates):
        random = torch.Generator().manual_seed(0)
        layer = torch.nn.Linear(8, 3)
        with torch.no_grad():
            layer.weight.copy_(0.01 * torch.randn(3, 8, generator=random))
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=MOMENTUM)
        order: list[int] = []
        for step in range(steps):
            while len(order) < BATCH:
                order += torch.randperm(300, generator=random).tolist()
            batch, order = order[:BATCH], order[BATCH:]
            share = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            optimizer.param_groups[0]["lr"] = rate * BATCH / 256 * share
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(layer(features[batch]), labels[batch])
            loss.backward()
            optimizer.step()
        # fp32: 25 steps of sums in another order
        torch.testing.assert_close(weights[turn], layer.weight.detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(biases[turn], layer.bias.detach(), atol=1e-4, rtol=1e-4)


def test_score_linear__names_both_inputs_and_what_it_chose() -> None:
    score = score_linear(overlapping(90, "quick"))
    assert score.protocol == "quick" and score.settings["input"] == "class token + mean patch"
    assert 0.7 < score.value <= 1.0 and 0.7 < score.settings["class token alone"] <= 1.0
    assert score_linear(overlapping(90, "quick")) == score


def test_predict__a_rate_that_ran_away_is_not_chosen() -> None:
    given = overlapping(60, "quick")
    features = 1e20 * given.train.class_token
    weights, biases = train_probes(features, given.train_labels, (1e30,), 20)
    assert weights.isfinite().all()
    assert predict(weights, biases, features).shape == (1, 60)
