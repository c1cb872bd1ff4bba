"""How often a step waits for the device: never between two logging intervals, neither our own code nor DeepSpeed's."""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from distill.bench import Bench, Request, family_of
from distill.bench_report import OURS
from distill.engine import prepare_deepspeed
from tests.distill.test_bench import HEADS, TINY
from tests.gpu import CPU_AND_GPU
from tests.ranks import on_ranks

# What gives the host a number. On a CPU nobody waits for it, but the calls are the same.
ASKING = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"}
PACKAGES = ("distill", "students", "teacher", "deepspeed")
STEPS = 8


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("HEADS", HEADS))
    return path


def package_in(path: str) -> str | None:
    """Which of the packages a file belongs to."""
    parts = Path(path).parts
    return None if "tests" in parts else next((p for p in PACKAGES if p in parts), None)


def caller() -> str:
    """The innermost of the packages that is at work."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if package := package_in(frame.f_code.co_filename):
            return package
        frame = frame.f_back
    return "unknown"


class Asked(TorchFunctionMode):
    """Counts who asks a tensor for its value."""

    def __init__(self) -> None:
        super().__init__()
        self.who: Counter[str] = Counter()

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function.__name__ in ASKING:
            self.who[caller()] += 1
        return function(*args, **(kwargs or {}))


def asked_in_a_block(request: Request, device_type: str) -> dict[str, int]:
    """Who asked how often in one block of steps, the clocks of the benchmark left away."""
    prepare_deepspeed(device_type)
    family, shape = family_of(request)
    bench = Bench(request, family, shape, torch.device(device_type))
    bench.warm_up(OURS)
    with Asked() as asked, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device_type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        bench.warm_up(OURS)
    waits = [w.filename for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return dict(asked.who + Counter(package_in(path) or path for path in waits))


def request_of(recipe: Path, device: str, precision: str) -> Request:
    overrides = ("engine.processes=1", f"engine.device={device}", f"engine.precision={precision}")
    return Request(str(recipe), overrides, (), 1, 10, STEPS, None, None, 1.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@CPU_AND_GPU
def test_loop__nobody_asks_the_device_for_anything(
    device: str, precision: str, recipe: Path
) -> None:
    request = request_of(recipe, device, precision)
    assert on_ranks(1, asked_in_a_block, request, device, device_type=device) == [{}]
