"""Launches and bytes of a step do not grow unnoticed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.jobs import ENVIRONMENT
from tests.support.step_budget import ACCEPT, COMPILED_FILE, FILE, counted_now, exceeded

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_budget__of_family_vit_grows_by_no_more_than_two_percent() -> None:
    now, budget = counted_now(), json.loads(FILE.read_text())
    assert now.keys() == budget.keys()
    assert not exceeded(now, budget), "\n".join(exceeded(now, budget))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_budget__of_compiled_parts_grows_by_no_more_than_two_percent() -> None:
    """In a process of its own: the compiler would trace the suite's shape checks."""
    command = [sys.executable, "-m", "tests.support.step_budget", "compiled"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    now, budget = json.loads(ended.stdout), json.loads(COMPILED_FILE.read_text())
    written = json.loads(FILE.read_text())
    assert now.keys() == budget.keys()
    assert not exceeded(now, budget), "\n".join(exceeded(now, budget))
    for name, figures in now.items():
        assert figures["other_bytes"] < 0.6 * written[name]["other_bytes"], name
        assert figures["launches"] < 0.85 * written[name]["launches"], name
        assert figures["matmul_bytes"] <= written[name]["matmul_bytes"], name


def test_budget__a_growth_is_named_with_the_way_to_accept_it() -> None:
    budget = {"vits16": {"launches": 100, "other_bytes": 1000}}
    assert not exceeded({"vits16": {"launches": 102, "other_bytes": 500}}, budget)
    (line,) = exceeded({"vits16": {"launches": 103, "other_bytes": 1000}}, budget)
    assert "vits16: launches 103, the budget is 100" in line and ACCEPT in line
