"""What this machine can and cannot do, each finding with the way to fix it."""

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill.engine.finding import Finding

MIN_FREE_GIB = 2.0
PICTURE_WH = (8, 6)
DALI = {12: "nvidia-dali-cuda120", 13: "nvidia-dali-cuda130"}  # packages by CUDA's major version
OLDEST_TORCH = (2, 11)
OLDEST_PYTHON = (3, 11)
IMPORT_TIMEOUT_S = 120  # DeepSpeed's import takes 2 s; on a cold network disk, a minute
RESOLVE_S = 10.0  # for a name server that does not answer
GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux
LIBRARIES = (
    "torch",
    "deepspeed",
    "numpy",
    "pydantic",
    "safetensors",
    "ruamel.yaml",
    "scikit-image",
    "matplotlib",
)


def examine() -> list[Finding]:
    """Every finding; none of the checks changes anything on the machine."""
    return [
        _python(sys.version_info[:2]),
        *(_library(name) for name in LIBRARIES),
        _torch(),
        _deepspeed(),
        _device(),
        _cores(),
        _decoder(),
        *_gpu_decoder(),
        *_cuda_versions(),
        _loopback(),
        _host_name(),
        _gloo(),
        _disk(Path.cwd()),
    ]


def _python(numbers: tuple[int, int]) -> Finding:
    needed, found = (".".join(map(str, each)) for each in (OLDEST_PYTHON, numbers))
    is_ok = numbers >= OLDEST_PYTHON
    return Finding("Python", found, is_ok, "" if is_ok else f"Install Python {needed} or newer.")


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


def _deepspeed() -> Finding:
    """In a separate process: its import changes logging and chooses an accelerator for good."""

    def look() -> str:
        command = [sys.executable, "-c", "import deepspeed"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S)
        if ended.returncode:
            lines = ended.stderr.strip().splitlines()
            raise RuntimeError(lines[-1] if lines else f"import ended with {ended.returncode}")
        return "imports"

    return _guarded(
        "deepspeed import", look, "DS_BUILD_OPS=0 pip install --force-reinstall deepspeed"
    )


def _device() -> Finding:
    def look() -> str:
        import torch

        from distill.engine.device import has_gpu

        if not has_gpu("auto"):
            return "no CUDA device; recipes run on the CPU"
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        kinds = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
        return f"{kinds}, NCCL {nccl}"

    return _guarded("devices", look, "Check the driver with nvidia-smi.")


def _cores() -> Finding:
    return Finding("CPU cores", str(len(os.sched_getaffinity(0))), is_ok=True)


def _decoder() -> Finding:
    def look() -> str:
        dali: Any = import_module("nvidia.dali")

        encoded, (width, height) = _picture("PNG"), PICTURE_WH
        pipeline = dali.Pipeline(batch_size=1, num_threads=1, device_id=None)
        with pipeline:
            files = dali.fn.external_source(source=lambda: [encoded])
            pipeline.set_outputs(dali.fn.decoders.image(files))
        pipeline.build()
        (image,) = pipeline.run()
        if image.at(0).shape != (height, width, 3):
            raise RuntimeError(f"an image of {height} x {width} came out as {image.at(0).shape}")
        return f"DALI {dali.__version__} decodes on the CPU"

    return _guarded("image decoder", look, f"pip install --constraint constraints.txt {DALI[13]}")


def _gpu_decoder() -> list[Finding]:
    """Whether ``data.decode: gpu`` works, where there is a GPU; no recipe needs it."""
    import torch

    if not torch.cuda.is_available():
        return []
    from distill.data.pipeline import decode_alone

    try:
        decode_alone(_picture("JPEG"), torch.cuda.current_device())
    except Exception as error:  # as in ``_guarded``
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        text = f"none, `data.decode: gpu` would be refused ({reason})"
        return [Finding("GPU decoder", text, is_ok=True)]
    return [Finding("GPU decoder", "DALI decodes on the GPU (`data.decode: gpu`)", is_ok=True)]


def _cuda_versions() -> list[Finding]:
    """The CUDA that DALI and torch were built for, where there is a GPU and they differ: decoding on the CPU, the default, does not mind."""
    import torch

    found = [major for major, name in DALI.items() if _is_installed(name)]
    wanted = int((torch.version.cuda or "0").split(".")[0])
    if not torch.cuda.is_available() or not found or wanted in found:
        return []
    text = f"DALI is for CUDA {found[0]}, torch for CUDA {wanted}: images are decoded on the CPU all the same"
    if wanted in DALI:
        text += f"; for `data.decode: gpu`: pip uninstall {DALI[found[0]]} && pip install {DALI[wanted]}"
    return [Finding("CUDA versions", text, is_ok=True)]


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _picture(kind: str) -> Any:
    """A red image, encoded, as an array of bytes."""
    import io

    import numpy as np
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", PICTURE_WH, (200, 40, 40)).save(buffer, kind)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _loopback() -> Finding:
    """Whether ranks of one machine can talk."""
    from distill.engine.loopback import loopback_interface, require_loopback

    def look() -> str:
        require_loopback({})
        return f"{loopback_interface()} answers: the ranks of one machine talk there"

    return _guarded("loopback", look, "Bring it up: ip link set lo up.")


def _host_name() -> Finding:
    """What ranks of several machines find each other by: gloo takes the interface of the host's name."""
    host, found = socket.gethostname(), list[str]()
    asking = threading.Thread(target=lambda: found.extend(_addresses(host)), daemon=True)
    asking.start()
    asking.join(RESOLVE_S)
    several = "for ranks of several machines set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    if not found:
        text = f"{host} does not resolve: one machine trains all the same; {several}"
        return Finding("host name", text, is_ok=True)
    here = _interfaces()
    interface = next((here[address] for address in found if address in here), "")
    text = f"{host} is {found[0]}"
    if not interface:
        text += f", which no interface here has; {several}"
    elif interface == "lo" or found[0].startswith("127."):
        text += f" ({interface}), which other machines cannot reach; {several}"
    else:
        text += f": ranks of several machines talk over {interface}"
    return Finding("host name", text, is_ok=True)


def _addresses(host: str) -> list[str]:
    try:
        return [str(each[4][0]) for each in socket.getaddrinfo(host, None, socket.AF_INET)]
    except (OSError, UnicodeError):
        return []


def _interfaces() -> dict[str, str]:
    """Interfaces by their IPv4 address."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # one without an address
                answer = fcntl.ioctl(any_, GET_ADDRESS, struct.pack("256s", name.encode()))
                found[socket.inet_ntoa(answer[20:24])] = name
    return found


def _gloo() -> Finding:
    """A process group as ranks of one machine make it."""

    def look() -> str:
        import torch.distributed as dist
        from torch._C._distributed_c10d import HashStore

        from distill.engine.loopback import VARIABLES, stay_on_loopback

        before = {name: os.environ.get(name) for name in VARIABLES}
        stay_on_loopback(os.environ)
        try:
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
            dist.barrier()
            dist.destroy_process_group()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        return "a process group starts and ends"

    return _guarded("gloo", look, "See the finding about loopback; ip addr shows the interfaces.")


def _disk(folder: Path) -> Finding:
    free_gib = shutil.disk_usage(folder).free / 2**30
    is_ok = free_gib >= MIN_FREE_GIB
    fix = f"Free some space, or pass --out on another disk; {MIN_FREE_GIB:g} GiB are needed."
    return Finding("free disk", f"{free_gib:.1f} GiB", is_ok, "" if is_ok else fix)
