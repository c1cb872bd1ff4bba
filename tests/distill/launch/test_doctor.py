import subprocess
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from distill.engine import device
from distill.engine.finding import Finding
from distill.errors import SetupError
from distill.launch import doctor
from distill.launch.doctor import examine


class Usage(NamedTuple):
    free: int


def test_examine__this_machine_can_train() -> None:
    findings = examine()
    assert [each for each in findings if not each.is_ok] == []
    assert {
        "Python",
        "torch",
        "deepspeed import",
        "devices",
        "image decoder",
        "gloo",
        "free disk",
    } <= {each.what for each in findings}


def test_examine__what_is_wrong_comes_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no op builder\n")

    monkeypatch.setattr(doctor, "LIBRARIES", ("no-such-library",))
    monkeypatch.setattr(doctor, "OLDEST_TORCH", (99, 0))
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 0))
    monkeypatch.setattr(subprocess, "run", no_process)
    monkeypatch.setattr(doctor, "import_module", lambda _: __import__("no_such_module"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(2**29))
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: 1 / 0)
    wrong = {each.what: each for each in examine() if not each.is_ok}
    assert {what: each.found for what, each in wrong.items()} == {
        "Python": wrong["Python"].found,
        "no-such-library": "not installed",
        "torch version": wrong["torch version"].found,
        "deepspeed import": "ImportError: no op builder",
        "image decoder": "No module named 'no_such_module'",
        "gloo": "division by zero",
        "free disk": "0.5 GiB",
    }
    assert "is older than 99.0" in wrong["torch version"].found
    assert all(each.fix for each in wrong.values())
    assert (
        wrong["no-such-library"].fix == "pip install --constraint constraints.txt no-such-library"
    )


def test_examine__leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    monkeypatch.chdir(tmp_path)
    examine()
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("installed", "of_torch", "parts"),
    [
        (12, "13.0", ["DALI is for CUDA 12, torch for CUDA 13", "install nvidia-dali-cuda130"]),
        (13, "12.8", ["DALI is for CUDA 13, torch for CUDA 12", "install nvidia-dali-cuda120"]),
        (12, "14.1", ["DALI is for CUDA 12, torch for CUDA 14"]),
        (12, "12.8", None),
        (13, "13.0", None),
        (None, "13.0", None),  # another finding names that
    ],
)
def test_cuda_versions__that_differ_are_named(
    installed: int | None,
    of_torch: str,
    parts: list[str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    names = [] if installed is None else [doctor.DALI[installed]]
    monkeypatch.setattr(doctor, "_is_installed", names.__contains__)
    assert doctor._cuda_versions() == []  # there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = doctor._cuda_versions()
    assert len(found) == (parts is not None)
    for part in parts or []:
        assert found[0].is_ok and part in found[0].found


def test_finding__as_plain_data() -> None:
    found = Finding("free disk", "1 GiB", is_ok=False, fix="Free some space.")
    assert found.to_json() == {
        "what": "free disk",
        "found": "1 GiB",
        "is_ok": False,
        "fix": "Free some space.",
    }


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_has_gpu__a_driver_that_torch_cannot_use_is_named(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6\n")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(device, "DRIVER_FILE", version)
    monkeypatch.setattr(device, "DEVICES_FOLDER", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(SetupError, match=r"driver 535\.54\.03 has a GPU, and torch \d"):
        device.take_device(wanted)
    found = doctor._device()
    assert not found.is_ok and "535.54.03" in found.found
    assert not device.has_gpu("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not device.has_gpu("auto")
    assert device.take_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(
    ("addresses", "told"),
    [
        ([], "gpu01 does not resolve: one machine trains all the same; for ranks of several"),
        (["127.0.1.1"], "gpu01 is 127.0.1.1, which no interface here has; for ranks of several"),
        (["127.0.0.1"], "gpu01 is 127.0.0.1 (lo), which other machines cannot reach; for ranks"),
        (["10.1.2.3"], "gpu01 is 10.1.2.3: ranks of several machines talk over eth7"),
    ],
)
def test_host_name__what_gloo_would_take(
    addresses: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "gpu01")
    monkeypatch.setattr(doctor, "_addresses", lambda _: addresses)
    here = {"127.0.0.1": "lo", "10.1.2.3": "eth7"}
    monkeypatch.setattr(doctor, "_interfaces", lambda: here)
    found = doctor._host_name()
    assert found.is_ok and found.found.startswith(told)


def test_host_name__a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "RESOLVE_S", 0.05)
    monkeypatch.setattr(doctor, "_addresses", lambda _: threading.Event().wait(5.0) or ["10.0.0.1"])
    assert "does not resolve" in doctor._host_name().found
    assert doctor._interfaces()["127.0.0.1"] == "lo"
