"""What this machine can and cannot do, each finding with the way to fix it."""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, no_type_check

MIN_FREE_GIB = 2.0
OLDEST_TORCH = (2, 11)
LIBRARIES = (
    "torch",
    "deepspeed",
    "pydantic",
    "safetensors",
    "ruamel.yaml",
    "scikit-image",
    "matplotlib",
)


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    found: str
    is_ok: bool
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """The finding as plain data."""
        return asdict(self)


def examine() -> list[Finding]:
    """Every finding; none of the checks changes anything on the machine."""
    return [
        *(_library(name) for name in LIBRARIES),
        _torch(),
        _device(),
        _cores(),
        _decoder(),
        _gloo(),
        _disk(Path.cwd()),
    ]


def _library(name: str) -> Finding:
    try:
        return Finding(name, version(name), is_ok=True)
    except PackageNotFoundError:
        return Finding(
            name,
            "not installed",
            is_ok=False,
            fix=f"pip install --constraint constraints.txt {name}",
        )


def _guarded(what: str, look: Callable[[], str], fix: str) -> Finding:
    """A check whose failure is its finding."""
    try:
        return Finding(what, look(), is_ok=True)
    except Exception as error:  # whatever the library raises is the finding
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding(what, reason, is_ok=False, fix=fix)


def _torch() -> Finding:
    def look() -> str:
        import torch

        numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if numbers < OLDEST_TORCH:
            raise RuntimeError(
                f"{torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}"
            )
        return f"imports, {torch.__version__}"

    return _guarded("torch version", look, "pip install --constraint constraints.txt torch")


def _device() -> Finding:
    def look() -> str:
        import torch

        if not torch.cuda.is_available():
            return "no CUDA device; recipes run on the CPU"
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{len(names)} x {names[0]}"

    return _guarded("devices", look, "Check the driver with nvidia-smi.")


def _cores() -> Finding:
    return Finding("CPU cores", str(len(os.sched_getaffinity(0))), is_ok=True)


def _decoder() -> Finding:
    def look() -> str:
        import io

        import numpy as np
        from nvidia.dali import fn
        from nvidia.dali.pipeline import pipeline_def
        from PIL import Image

        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (200, 40, 40)).save(buffer, "PNG")
        encoded = np.frombuffer(buffer.getvalue(), np.uint8)

        @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # type: ignore[call-overload,untyped-decorator]  # None means CPU
        @no_type_check  # DALI rewrites this function's source
        def graph() -> Any:
            return fn.decoders.image(fn.external_source(source=lambda: [encoded]))

        pipeline = graph()
        pipeline.build()
        (image,) = pipeline.run()
        return f"DALI {version('nvidia-dali-cuda120')} decodes on the CPU, {image.at(0).shape}"

    return _guarded(
        "image decoder", look, "pip install --constraint constraints.txt nvidia-dali-cuda120"
    )


def _gloo() -> Finding:
    def look() -> str:
        import torch.distributed as dist
        from torch._C._distributed_c10d import HashStore

        store = HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        dist.barrier()
        dist.destroy_process_group()
        return "a process group starts and ends"

    return _guarded(
        "gloo", look, "Check that the host name resolves: `hostname -i` should print an address."
    )


def _disk(folder: Path) -> Finding:
    free_gib = shutil.disk_usage(folder).free / 2**30
    fix = (
        ""
        if free_gib >= MIN_FREE_GIB
        else f"Free some space, or pass --out on another disk; {MIN_FREE_GIB:g} GiB are needed."
    )
    return Finding("free disk", f"{free_gib:.1f} GiB", is_ok=free_gib >= MIN_FREE_GIB, fix=fix)
