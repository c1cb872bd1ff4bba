"""A machine without loopback, or with a name that resolves nowhere: one line, or a job like any other."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import ENVIRONMENT, RUN, write_recipes

pytestmark = pytest.mark.slow  # whole commands

DOWN = ("unshare", "--net")  # a network of its own, whose loopback is down
NOWHERE = ("unshare", "--uts", "sh", "-c", 'hostname no-such-host.invalid && exec "$0" "$@"')


def distill(where: tuple[str, ...], *words: str) -> "subprocess.CompletedProcess[str]":
    tried = subprocess.run([*where, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"{' '.join(where)} is refused here: {tried.stderr.strip()}")
    command = [*where, sys.executable, "-m", "distill", *words]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=False
    )


def test_train__without_loopback_ends_with_one_line(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path, stage_steps=11, steps=1, save_every=1000)
    ended = distill(DOWN, "train", str(recipe), "--out", str(tmp_path), "--gpus", "2")
    assert ended.returncode == 3, ended.stderr
    first, second = ended.stderr.splitlines()
    assert first.startswith("127.0.0.1 cannot be reached (") and "over loopback" in first
    assert second.startswith("Fix: Bring it up: ip link set lo up.")
    assert not (tmp_path / RUN).exists()


def test_doctor__without_loopback_names_it() -> None:
    ended = distill(DOWN, "doctor")
    assert ended.returncode == 3
    assert "FAIL  loopback: 127.0.0.1 cannot be reached" in ended.stdout
    assert "Fix: Bring it up: ip link set lo up." in ended.stdout


def test_train__a_host_name_that_resolves_nowhere_changes_nothing(tmp_path: Path) -> None:
    recipe = write_recipes(tmp_path, stage_steps=11, steps=1, save_every=1000)
    ended = distill(NOWHERE, "train", str(recipe), "--out", str(tmp_path), "--gpus", "2")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / RUN / "summary.json").is_file()
    looked = distill(NOWHERE, "doctor")
    assert looked.returncode == 0, looked.stdout
    assert "host name: no-such-host.invalid does not resolve" in looked.stdout
