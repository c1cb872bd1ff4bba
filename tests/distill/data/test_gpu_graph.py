"""The loader's graph for a GPU: put together without one, and every operator exists for the device it is put on."""

import io
from typing import Any

import numpy as np
import nvidia.dali.backend as backend
import pytest
from nvidia.dali import Pipeline
from PIL import Image

from distill.data.crops import CropSpec
from distill.data.pipeline import build_pipeline, find_refused

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
    (decoding,) = (each for each in pipeline._ops if _schema_of(each._op) == "decoders__Image")
    arguments = str(
        decoding.spec
    )  # a part of the batch to other hardware makes pixels depend on the place
    assert "hw_decoder_load: 0.0" in arguments and "jpeg_fancy_upsampling: True" in arguments
    for device, schema in placed:
        assert schema in EXISTING[device], (device, schema)
    assert [output.device for output in pipeline._graph_outputs] == ["gpu"] * 3


def _schema_of(operator: Any) -> str:
    return str(getattr(operator, "schema_name", None) or type(operator).__name__)


def test_find_refused__asks_the_decoder_of_the_cpu() -> None:
    """Without a GPU, on every machine alike."""
    good, truncated = (
        np.frombuffer(encoded, np.uint8) for encoded in (_jpeg(), b"\xff\xd8\xff\xe0" + bytes(64))
    )
    assert find_refused([good, truncated, good]) == [1]


def _jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 40, 40)).save(buffer, "JPEG")
    return buffer.getvalue()
