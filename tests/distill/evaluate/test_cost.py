"""What networks cost, and which of them are worth it: on votes whose order is known."""

import pytest
import torch

from distill.evaluate import cost
from distill.evaluate.conclusion import Voted
from distill.evaluate.cost import (
    Cost,
    costs_to_json,
    describe_choice,
    measure_cost,
    sensible_choices,
)
from distill.screen.results import cost_rows
from students.student import build_backbone
from tests.support.tiny import SPEC

CPU = torch.device("cpu")
IMAGES = 400
LABELS = torch.arange(IMAGES) % 4


def cost_of(least_ms: float | None) -> Cost:
    latency = {} if least_ms is None else {"1 thread": 2 * least_ms, "2 threads": least_ms}
    return Cost(64, 1000, 0.5, 0.004, latency, None if least_ms is None else 100.0)


def votes(fraction: float) -> Voted:
    """The same images right for every network, as far as its score goes."""
    right = torch.arange(IMAGES) < fraction * IMAGES
    return Voted(fraction, right)


def test_measure_cost__has_the_facts_of_the_shape_and_a_time_for_one_thread_and_all() -> None:
    backbone = build_backbone(SPEC, torch.Generator().manual_seed(0), CPU).eval()
    threads = torch.get_num_threads()
    found = measure_cost(backbone, SPEC, 16, CPU, torch.float32)
    assert (found.size, found.parameters) == (16, SPEC.parameters)
    assert found.parameters == sum(p.numel() for p in backbone.parameters())
    assert found.gflop == SPEC.flops(16) / 1e9 and found.megabytes == 4e-6 * SPEC.parameters
    assert len(found.latency_ms) == len({1, threads}) and "1 thread" in found.latency_ms
    assert found.least_ms is not None and found.least_ms > 0
    assert found.images_per_s is not None and found.images_per_s > 0
    assert torch.get_num_threads() == threads


def test_measure_cost__a_network_that_takes_minutes_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cost, "MOST_GFLOP_ON_CPU", 0.0)
    found = measure_cost(torch.nn.Identity(), SPEC, 16, CPU, torch.float32)
    assert found.latency_ms == {} and found.images_per_s is None and found.least_ms is None


def test_sensible_choices__each_is_better_than_every_faster_one() -> None:
    costs = {
        "slow": cost_of(9.0),
        "worse": cost_of(3.0),
        "level": cost_of(2.0),
        "fast": cost_of(1.0),
        "untimed": cost_of(None),
    }
    scores = {"slow": 0.9, "worse": 0.4, "level": 0.702, "fast": 0.7, "untimed": 0.99}
    voted = {name: votes(score) for name, score in scores.items()}
    names = sensible_choices(costs, voted, LABELS)
    assert names == ["fast", "slow"]
    text = describe_choice(names, costs, voted)
    assert text.startswith("Take fast (1 ms an image, k-NN 0.700), or slow (9 ms an image")
    alone = describe_choice(["fast"], costs, voted)
    assert alone.endswith("no slower network is better as far as these images can show.")


def test_cost_rows__one_for_each_network_with_the_machine_in_the_title() -> None:
    costs = {"small": cost_of(1.5), "teacher": cost_of(None)}
    summary = {"cost": costs_to_json(costs, CPU, ["small"], "Take small.")}
    found = cost_rows(summary)
    assert found is not None and found.title.endswith(f"{torch.get_num_threads()} threads")
    assert found.headings[4:] == ("ms, 1 thread", "ms, 2 threads", "images/s")
    assert found.rows[0] == ["small", "1,000", "0.5", "0.004", "3", "1.5", "100"]
    assert found.rows[1][4:] == ["-", "-", "-"]
    assert cost_rows({}) is None
