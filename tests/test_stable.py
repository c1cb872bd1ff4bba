"""What docs/upgrading.md calls stable: exit codes, and the keys of JSON output and of status.json."""

import json
from copy import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from distill.engine.finding import Finding
from distill.errors import DataError, PlanError, RecipeError, SetupError, UserError
from distill.launch.local import STOPPED_EXIT_CODE
from distill.runfolder.failure import LOST_EXIT_CODE
from distill.runfolder.parked import PARKED_EXIT_CODE
from distill.runfolder.status import CheckpointStatus, NetworkStatus, PhaseStatus, Status
from tests.support.command import exit_code_of

ROOT = Path(__file__).parent.parent
STORED = json.loads((ROOT / "tests" / "fixtures" / "stable-0.2.0.json").read_text())


def key_paths(value: Any, prefix: str = "") -> set[str]:
    """Every key of a JSON value, as ``memory_gib.weights``; items of a list count as one."""
    if isinstance(value, list):
        return set().union(*(key_paths(item, prefix) for item in value)) if value else set()
    if not isinstance(value, dict):
        return {prefix.rstrip(".")}
    return set().union(*(key_paths(item, f"{prefix}{key}.") for key, item in value.items()))


@pytest.mark.parametrize("command", STORED["commands"])
def test_json__keeps_its_keys(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(*command.split()) == 0
    printed = key_paths(json.loads(capsys.readouterr().out))
    assert set(STORED["commands"][command]) - printed == set()


def test_doctor__keeps_its_keys() -> None:
    assert key_paths([Finding("Python", "3.11", is_ok=True).to_json()]) == set(
        STORED["doctor --json"]
    )


def test_status__keeps_its_keys() -> None:
    kinds = (Status, PhaseStatus, NetworkStatus, CheckpointStatus)
    held = {f"{kind.__name__}.{field.name}" for kind in kinds for field in fields(kind)}
    assert set(STORED["status.json"]) - held == set()


def test_exit_code__of_an_error_survives_another_process() -> None:
    kept = [UserError("a", fix="b", exit_code=LOST_EXIT_CODE), RecipeError("a", fix="b")]
    for error in kept:
        copied = copy(error)  # by the same protocol as between processes
        assert type(copied) is type(error) and copied.exit_code == error.exit_code
        assert (copied.message, copied.fix) == ("a", "b")


def test_exit_codes__are_those_on_the_pages() -> None:
    codes = {
        "failed": UserError.exit_code,
        "wrong recipe or usage": RecipeError.exit_code,
        "the machine lacks something": SetupError.exit_code,
        "a rank died or hung": LOST_EXIT_CODE,
        "finished with a parked student": PARKED_EXIT_CODE,
        "saved and stopped by Ctrl-C": STOPPED_EXIT_CODE,
    }
    assert codes == STORED["exit codes"]
    assert (PlanError.exit_code, DataError.exit_code) == (2, 1)
    for page in ("upgrading.md", "faults.md"):
        text = (ROOT / "docs" / page).read_text()
        assert all(f"{code} {meaning}" in text for meaning, code in codes.items()), page
