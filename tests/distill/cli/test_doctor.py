import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from distill.cli import doctor
from distill.cli.doctor import Finding, examine


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


def test_finding__as_plain_data() -> None:
    found = Finding("free disk", "1 GiB", is_ok=False, fix="Free some space.")
    assert found.to_json() == {
        "what": "free disk",
        "found": "1 GiB",
        "is_ok": False,
        "fix": "Free some space.",
    }
