"""Every thread that touches a GPU makes it its own first: a new thread has GPU 0, whatever its process computes on."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distill.data.crops import CropSchedule, CropSpec
from distill.data.feed import Feed
from distill.data.loader import Loader
from distill.launch.rank import _leave_group
from teacher.batch import use_device

ROOT = Path(__file__).parents[1]
STARTERS = {"Thread", "ThreadPoolExecutor", "Timer"}
# Files whose threads only read, write, decode, draw or watch: no tensor of a device is in their reach
HOST_ONLY = {
    "distill/runfolder/saver.py",  # tensors are in host memory before it is started
    "distill/data/dataset_report.py",
    "distill/data/feed.py",
    "distill/data/build_index.py",
    "distill/report/summary.py",  # writes the status
    "distill/listing/limit.py",
    "distill/launch/local.py",
    "distill/launch/process.py",
    "distill/launch/doctor.py",  # asks for the address of a host
    "distill/launch/milestones.py",  # waits for the end of its process
    "distill/launch/trackers.py",  # waits for the end of its process
    "distill/engine/peer_copies.py",  # sends host memory over gloo
    "distill/runfolder/heartbeat.py",
    "distill/train/student.py",  # judges a state in host memory; a device judges its
    "distill/train/masking.py",  # masks are drawn with NumPy; the caller copies them
}
ON_DEVICE = {"distill/data/loader.py": 2, "distill/launch/rank.py": 1}  # threads they start


def starts(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            if (name if isinstance(name, str) else getattr(name, "id", "")) in STARTERS:
                yield node


def test_threads__are_of_the_host_or_known_to_set_their_device() -> None:
    found = {
        str(path.relative_to(ROOT)): len(calls)
        for package in ("distill", "students", "teacher")
        for path in sorted((ROOT / package).rglob("*.py"))
        if (calls := list(starts(path)))
    }
    assert found.keys() == HOST_ONLY | ON_DEVICE.keys(), "a new thread: does it touch a device?"
    assert {path: found[path] for path in ON_DEVICE} == ON_DEVICE


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What threads set, in order."""
    seen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    return seen


def test_use_device__sets_a_gpu_and_leaves_a_cpu(devices: list[Any]) -> None:
    use_device(torch.device("cpu"))
    assert devices == []
    use_device(torch.device("cuda", 3))
    assert devices == [torch.device("cuda", 3)]


def test_loader__its_decoder_runs_on_the_device_of_its_rank(devices: list[Any]) -> None:
    feed = mock.create_autospec(Feed, instance=True)
    crops = CropSchedule.one(CropSpec(32, (0.3, 1.0), 2, 16, (0.1, 0.3), None, 0.5, (0.1, 2.0)))
    device = torch.device("cuda", 3)
    made = Loader(feed, crops, max_images=1, num_threads=1, device=device)
    assert devices == []
    made._running.submit(devices.append, "decodes").result()
    made.close()
    assert devices == [device, "decodes"]


def test_leave_group__destroys_on_the_device_of_its_rank(
    devices: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: devices.append("destroyed"))
    assert _leave_group() and devices == ["destroyed"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    assert _leave_group()
    assert devices == ["destroyed", torch.device("cuda", 5), "destroyed"]
