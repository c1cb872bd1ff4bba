"""The choice, on a GPU that is only said to be there; ``tests.teacher.test_kernels`` has what the kernels give."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.engine import logit_kernels
from distill.engine.logit_kernels import logit_steps, why_not
from teacher.chunks import AS_WRITTEN
from teacher.kernels import KernelSteps


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    why_not.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(logit_kernels, "trial", lambda *_: 5e-3)
    yield
    why_not.cache_clear()


def choice(width: int = 8) -> Any:
    prototypes: Any = SimpleNamespace(device=torch.device("cuda"), shape=(4, width))
    return logit_steps.__wrapped__(prototypes, AS_WRITTEN)  # type: ignore[attr-defined]


def test_logit_steps__a_cpu_takes_the_chunks() -> None:
    assert logit_steps(torch.zeros(4, 8), AS_WRITTEN) == (AS_WRITTEN, "")


def test_logit_steps__a_gpu_that_passes_the_trial_takes_kernels() -> None:
    assert choice() == (KernelSteps(AS_WRITTEN), "")


def test_logit_steps__an_old_gpu_or_a_wide_bottleneck_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps, line = choice(1024)
    assert steps is AS_WRITTEN and "a bottleneck of 1024 is wider than 512" in line
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    steps, line = choice()
    assert steps is AS_WRITTEN and "compute capability 7.5, kernels need 8.0" in line


def test_logit_steps__kernels_that_fail_or_differ_are_left_with_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("out of resource: shared memory\nRequired: 327936")

    monkeypatch.setattr(logit_kernels, "trial", fail)
    steps, line = choice()
    assert steps is AS_WRITTEN
    assert line.endswith("in chunks: kernels fail (out of resource: shared memory)")
    for difference in (0.2, float("nan")):
        why_not.cache_clear()
        monkeypatch.setattr(logit_kernels, "trial", lambda *_, d=difference: d)
        steps, line = choice()
        assert steps is AS_WRITTEN and f"kernels differ by {difference:.2g} from" in line
