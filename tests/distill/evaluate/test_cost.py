"""What networks cost, and which of them are worth it: on votes whose order is known."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.evaluate import cost
from distill.evaluate.conclusion import Voted
from distill.evaluate.cost import (
    Cost,
    GraphCost,
    costs_to_json,
    describe_choice,
    measure_cost,
    measure_graphs,
    sensible_choices,
)
from distill.screen.results import cost_rows
from students.student import build_backbone
from tests.support.graphs import write_graph
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


def test_measure_graphs__files_and_times_by_threads_or_why_there_are_none(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    graph = write_graph(tmp_path / "model.onnx")
    broken = tmp_path / "model.int8.onnx"
    broken.write_bytes(b"no graph")
    facts = {"export": {"int8": {"knn": {"int8": 0.25}}}}
    (tmp_path / "distill.json").write_text(json.dumps(facts))
    found = measure_graphs({"onnx": graph, "onnx int8": broken}, SPEC, 16)
    timed, failed = found["onnx"], found["onnx int8"]
    assert timed.megabytes == graph.stat().st_size / 1e6 and not timed.reason
    assert len(timed.latency_ms) == len({1, torch.get_num_threads()})
    assert all(each > 0 for each in timed.latency_ms.values()) and timed.knn is None
    assert timed.images_per_s is not None and timed.images_per_s > 0
    assert failed.latency_ms == {} and failed.images_per_s is None and failed.knn == 0.25
    assert failed.megabytes == 8e-6 and failed.reason


def test_measure_graphs__a_network_that_takes_minutes_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "MOST_GFLOP_ON_CPU", 0.0)
    (tmp_path / "model.onnx").write_bytes(b"never read")
    (found,) = measure_graphs({"onnx": tmp_path / "model.onnx"}, SPEC, 16).values()
    assert found.latency_ms == {} and found.reason == "too large to time on a CPU"


def test_cost_rows__graphs_stand_below_their_network() -> None:
    graphs = {
        "onnx": GraphCost(0.7, {"1 thread": 0.5}, 2000.0),
        "onnx int8": GraphCost(0.3, {}, None, "no runtime"),
    }
    costs = {"small": replace(cost_of(1.5), graphs=graphs)}
    summary = json.loads(json.dumps({"cost": costs_to_json(costs, CPU, ["small"], "Take small.")}))
    found = cost_rows(summary)
    assert found is not None
    assert found.rows[1:] == [
        ["  onnx", "-", "-", "0.7", "0.5", "-", "2,000"],
        ["  onnx int8", "-", "-", "0.3", "-", "-", "-"],
    ]
    assert found.notes[1] == "small, onnx int8: not timed (no runtime)"
    assert "onnx: by onnxruntime on the CPU" in found.notes[0]
