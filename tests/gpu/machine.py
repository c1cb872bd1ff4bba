"""What the machine is: versions, the findings of ``doctor``, the tests marked gpu."""

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from tests.gpu.clock import Figures, NotHereError
from tests.gpu.sizes import Sizes

ROOT = Path(__file__).parents[2]
PACKAGES = ("deepspeed", "torchao", "triton", "numpy", "pydantic", "pillow", "nvidia-dali-cuda130")


def versions(device: torch.device, sizes: Sizes) -> Figures:
    """Versions of Python, torch, CUDA, NCCL, the packages, and what the device is."""
    figures: Figures = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            figures[name] = version(name)
        except PackageNotFoundError:
            figures[name] = "missing"
    figures["cores"] = len(os.sched_getaffinity(0))
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        figures["gpu"] = properties.name
        figures["gpu_gib"] = round(properties.total_memory / 2**30, 1)
        figures["capability"] = f"{properties.major}.{properties.minor}"
        figures["cuda"] = str(torch.version.cuda)
        figures["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        figures["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return figures


def doctor(device: torch.device, sizes: Sizes) -> Figures:
    """Findings of ``distill doctor``; what it finds missing is a figure, since DALI may be."""
    from distill.launch.doctor import examine

    findings = examine()
    figures: Figures = {"ok": sum(finding.is_ok for finding in findings)}
    figures["not ok"] = {each.what: each.found for each in findings if not each.is_ok}
    return figures


def gpu_tests(device: torch.device, sizes: Sizes) -> Figures:
    """Tests marked gpu, in a process of their own: passed, failed, skipped."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rfE"]
    ended = subprocess.run(
        [*command, *sizes.gpu_tests],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": device.type},
        capture_output=True,
        text=True,
        timeout=sizes.gpu_tests_s,
    )
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", _last_line(ended))}
    figures: Figures = {
        name: counts.get(name, 0) for name in ("passed", "failed", "skipped", "errors")
    }
    if ended.returncode:
        figures["output"] = (ended.stdout + ended.stderr)[-4000:]
        figures["problems"] = [f"pytest ended with {ended.returncode}: {_last_line(ended)}"]
    elif device.type == "cuda" and not figures["passed"]:
        figures["problems"] = ["no test marked gpu was run"]
    return figures


def _last_line(ended: "subprocess.CompletedProcess[str]") -> str:
    lines = (ended.stdout + ended.stderr).strip().splitlines()
    return lines[-1] if lines else "no output"


def two_ranks(device: torch.device, sizes: Sizes) -> Figures:
    """Names what one GPU cannot show."""
    raise NotHereError(
        "needs two GPUs, because two ranks cannot share one under NCCL: exchange, gradients of a group, "
        "a sharded teacher, a lost peer; run the job of recipes/bench_cpu.yaml on two"
    )
