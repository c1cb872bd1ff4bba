"""How often a step waits for the device: never between two logging intervals, neither our own code nor DeepSpeed's."""

import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from distill.bench.measure import Bench, Request, family_of
from distill.bench.report import OURS
from distill.engine.engine import prepare_deepspeed
from tests.support.gpu import CPU_AND_GPU
from tests.support.jobs import HEADS, TINY
from tests.support.pretend_gpu import package_in, pretending
from tests.support.spawn import on_ranks

STEPS = 8


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("HEADS", HEADS))
    return path


def asked_in_a_block(request: Request, device_type: str) -> dict[str, int]:
    """Who asked how often in one block of steps, the clocks of the benchmark left away."""
    prepare_deepspeed(device_type)
    family, shape = family_of(request)
    if device_type == "cpu":
        with pretending() as gpu:
            bench = Bench(request, family, shape, torch.device("cuda", 0))
            bench.warm_up(OURS)
            gpu.asked.clear()
            bench.warm_up(OURS)
        return dict(gpu.asked)
    bench = Bench(request, family, shape, torch.device(device_type))
    bench.warm_up(OURS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        bench.warm_up(OURS)
    waits = [w.filename for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return dict(Counter(package_in(path) or path for path in waits))


@pytest.mark.parametrize(
    "precision",
    [pytest.param("fp32", marks=pytest.mark.slow), pytest.param("bf16", marks=pytest.mark.slow)],
)
@CPU_AND_GPU
def test_loop__nobody_asks_the_device_for_anything(
    device: str, precision: str, recipe: Path
) -> None:
    overrides = ("engine.processes=1", f"engine.device={device}", f"engine.precision={precision}")
    request = Request(str(recipe), overrides, (), 1, 10, STEPS, None, None, 1.0)
    found = on_ranks(1, asked_in_a_block, request, device, device_type=device, timeout_s=400)
    assert found == [{}]
