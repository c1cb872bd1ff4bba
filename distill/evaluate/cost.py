"""What networks cost to run on this machine, beside their scores, and which of them are sensible choices.

    latency       of one image, median of repeated forward passes; on a CPU with one thread and with all
    throughput    images a second in batches of ``BATCH``
    choice        from the fastest on, each network that is better than every faster one, by the same
                  interval over held-out images as in the conclusion

Graphs of onnx that were exported beside a network or in its run are timed in onnxruntime on the CPU in the same way.

Decoding and preparing the image are not in the times, and nothing is compiled: they compare networks, and are no
promise for another runtime. A network of which one image would take minutes is not timed.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from distill.evaluate.conclusion import Voted
from distill.export.graphs import Graph
from distill.export.int8 import INT8_FILE
from distill.export.licences import record_in
from distill.protocols.score import bootstrap, interval_of
from students.shapes import BackboneSpec

BATCH = 32
LEAST_S, LEAST_CALLS, MOST_CALLS = 0.3, 3, 50  # of one measurement
MOST_GFLOP_ON_CPU = 2000.0  # of one image; a minute on a slow CPU
BYTES_FP32 = 4


@dataclass(frozen=True)
class GraphCost:
    """Of an exported graph on the CPU: its file, and times as those of ``Cost``, or the reason why there are none.

    ``knn``: of an int8 graph, as its export measured it on the held-out images of the run.
    """

    megabytes: float
    latency_ms: Mapping[str, float]
    images_per_s: float | None
    reason: str = ""
    knn: float | None = None


@dataclass(frozen=True)
class Cost:
    """Of one network at ``size`` x ``size`` px.

    ``latency_ms``: by threads on a CPU, else by the device; empty where it is not timed. ``graphs``: of each exported
    graph, by what tables call it.
    """

    size: int
    parameters: int
    gflop: float
    megabytes: float
    latency_ms: Mapping[str, float]
    images_per_s: float | None
    graphs: Mapping[str, GraphCost] = field(default_factory=dict)

    @property
    def least_ms(self) -> float | None:
        """The shortest of its latencies."""
        return min(self.latency_ms.values(), default=None)


def measure_cost(
    backbone: nn.Module, spec: BackboneSpec, size: int, device: torch.device, dtype: torch.dtype
) -> Cost:
    """Times a network that is on its device and in evaluation mode. Waits for the device; no communication."""
    gflop = spec.flops(size) / 1e9
    facts = (size, spec.parameters, gflop, BYTES_FP32 * spec.parameters / 1e6)
    if device.type == "cpu" and gflop > MOST_GFLOP_ON_CPU:
        return Cost(*facts, {}, None)
    pixels = torch.rand(
        BATCH, spec.in_channels, size, size, generator=torch.Generator().manual_seed(0)
    )
    run = Timed(backbone, device, dtype)
    if device.type != "cpu":
        return Cost(*facts, {device.type: 1e3 * run(pixels[:1])}, BATCH / run(pixels))
    latency = {}
    for count in _thread_counts():
        with _threads(count):
            latency[_words(count)] = 1e3 * run(pixels[:1])
    return Cost(*facts, latency, BATCH / run(pixels))


def measure_graphs(
    paths: Mapping[str, Path], spec: BackboneSpec, size: int
) -> dict[str, GraphCost]:
    """Times graphs in onnxruntime at ``size`` x ``size`` px, by the same names; without times where it is missing or fails."""
    found = {}
    for name, path in paths.items():
        files = [path, path.with_name(f"{path.name}.data")]
        megabytes = sum(each.stat().st_size for each in files if each.is_file()) / 1e6
        if spec.flops(size) / 1e9 > MOST_GFLOP_ON_CPU:
            found[name] = GraphCost(megabytes, {}, None, "too large to time on a CPU")
            continue
        try:
            found[name] = _time_graph(path, spec, size, megabytes)
        except Exception as error:  # whatever the library raises, the graph is not timed
            first = (str(error).splitlines() or [type(error).__name__])[0]
            found[name] = GraphCost(megabytes, {}, None, first)
    return {name: replace(each, knn=_knn_of(paths[name])) for name, each in found.items()}


def _knn_of(graph: Path) -> float | None:
    """k-NN of an int8 graph in the record beside it."""
    if graph.name != INT8_FILE:
        return None
    measured = record_in(graph.parent).get("export", {}).get("int8", {})
    return measured.get("knn", {}).get("int8")


def _time_graph(path: Path, spec: BackboneSpec, size: int, megabytes: float) -> GraphCost:
    pixels = torch.rand(
        BATCH, spec.in_channels, size, size, generator=torch.Generator().manual_seed(0)
    )
    latency, run = {}, None
    for count in _thread_counts():
        run = Timed(Graph(path, spec.stride, count), torch.device("cpu"), torch.float32)
        latency[_words(count)] = 1e3 * run(pixels[:1])
    assert run is not None, "there is one number of threads at least"
    return GraphCost(megabytes, latency, BATCH / run(pixels))


def _thread_counts() -> list[int]:
    return sorted({1, torch.get_num_threads()})


def _words(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


class Timed:
    """Measures the median seconds of a forward pass; waits for the device."""

    def __init__(self, backbone: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._backbone, self._device, self._dtype = backbone, device, dtype

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> float:
        pixels, seconds = pixels.to(self._device), list[float]()
        self._forward_s(pixels)  # the first call allocates
        while len(seconds) < MOST_CALLS and (len(seconds) < LEAST_CALLS or sum(seconds) < LEAST_S):
            seconds.append(self._forward_s(pixels))
        return median(seconds)

    def _forward_s(self, pixels: Tensor) -> float:
        began = time.perf_counter()
        is_fp32 = self._dtype == torch.float32
        with torch.autocast(self._device.type, self._dtype, enabled=not is_fp32):
            self._backbone(pixels)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - began


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sensible_choices(
    costs: Mapping[str, Cost], votes: Mapping[str, Voted], labels: Int64[Tensor, " images"]
) -> list[str]:
    """Names from the fastest on, each better than every faster one as far as these images can show; the reference is none of them."""
    timed = [name for name in costs if name in votes and costs[name].least_ms is not None]
    found: dict[str, Tensor] = {}
    for name in sorted(timed, key=lambda each: costs[each].least_ms or 0.0):
        scores = bootstrap(votes[name].right, labels)
        if all(interval_of(scores - rival)[0] > 0 for rival in found.values()):
            found[name] = scores
    return list(found)


def describe_choice(
    names: Sequence[str], costs: Mapping[str, Cost], votes: Mapping[str, Voted]
) -> str:
    """One sentence: what to take, and why not another."""
    words = [
        f"{name} ({costs[name].least_ms:.3g} ms an image, k-NN {votes[name].value:.3f})"
        for name in names
    ]
    if len(words) == 1:
        return f"Take {words[0]}: no slower network is better as far as these images can show."
    return f"Take {', or '.join(words)}: each is better than every faster one; all others are slower than one of them and not better."


def costs_to_json(
    costs: Mapping[str, Cost], device: torch.device, choices: Sequence[str], choice: str
) -> dict[str, Any]:
    """As ``summary.json`` holds it."""
    return {
        "device": device_name(device),
        "batch": BATCH,
        "networks": {name: asdict(each) for name, each in costs.items()},
        "choices": list(choices),
        "choice": choice,
    }


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  # no file of a user
            lines = (line.partition(":") for line in file)
            return next(value.strip() for key, _, value in lines if key.strip() == "model name")
    except (OSError, StopIteration):
        return "CPU"
