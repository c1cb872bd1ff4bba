"""The loader's graph for a GPU: put together without one, and every operator exists for the device it is put on."""

from typing import Any

import nvidia.dali.backend as backend
import pytest
from nvidia.dali import Pipeline

from distill.data.crops import CropSpec
from distill.data.pipeline import build_pipeline

SPEC = CropSpec(32, (0.32, 1.0), 2, 16, (0.05, 0.32), 48, 0.5, (0.1, 2.0))
EXISTING = {
    "cpu": backend.RegisteredCPUOps(),
    "gpu": backend.RegisteredGPUOps(),
    "mixed": backend.RegisteredMixedOps(),
}


def test_build_pipeline__puts_every_operator_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Pipeline, "build", Pipeline._build_graph)  # no more than Python's part
    pipeline = build_pipeline(SPEC, lambda: (), batch=4, num_threads=2, device_id=0, prefetch=2)
    placed = {(operator._op.device, _schema_of(operator._op)) for operator in pipeline._ops}
    assert {("mixed", "decoders__Image"), ("gpu", "Resize"), ("gpu", "GaussianBlur")} <= placed
    for device, schema in placed:
        assert schema in EXISTING[device], (device, schema)
    assert [output.device for output in pipeline._graph_outputs] == ["gpu"] * 3


def _schema_of(operator: Any) -> str:
    return str(getattr(operator, "schema_name", None) or type(operator).__name__)
