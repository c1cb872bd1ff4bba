"""Memory for copies of the state: two of them, on two nodes, and one line where it is missing."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from distill.engine.node_memory import VARIABLE
from distill.plan.copies import (
    COPY_GB_PER_S,
    DISK_GB_PER_S,
    copies_gib,
    lacking_memory,
    largest_state_gb,
    late_stop,
)
from distill.plan.job import check_job
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job
from tests.support.jobs import write_recipes


def test_copies_gib__is_the_largest_phase_twice_on_two_nodes(tmp_path: Path) -> None:
    recipe = str(write_recipes(tmp_path, stage_steps=10, steps=10, save_every=5))
    plans = check_job(*load_job(recipe, []), 2)
    states = [sum(m.optimizer + m.ema for m in job.footprint.memory) for job in plans]
    assert max(states) > min(states) > 0.0
    assert copies_gib(plans, 1) == copies_gib(plans, 2) == 2 * max(states)
    assert copies_gib(plans, 4) == max(states)


@pytest.mark.parametrize("has_room", [True, False])
def test_lacking_memory__is_one_line_with_both_figures(
    tmp_path: Path, has_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    free = 2**26 if has_room else 2**15
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    recipe = str(write_recipes(tmp_path, stage_steps=10, steps=10, save_every=5))
    without, teacher = load_job(recipe, [])
    assert isinstance(without, FamilyRecipe)
    plans = check_job(without, teacher, 2)
    assert lacking_memory(without, plans, 2, None) == []
    wanted, _ = load_job(recipe, ["checkpoint.peer=true"])
    lines = lacking_memory(wanted, plans, 2, None)
    if has_room:
        assert lines == []
        return
    (line,) = lines
    assert line.startswith("checkpoint.peer: the copies take 0.00")
    assert (
        f"GiB of {tmp_path} on a node, 3.1e-05 are free here, where copies end when it is full"
        in line
    )
    assert line.endswith("--shm-size=1m")


def test_late_stop__is_a_line_where_two_steps_and_a_save_take_longer(tmp_path: Path) -> None:
    recipe = str(write_recipes(tmp_path, stage_steps=10, steps=10, save_every=5))
    job = check_job(*load_job(recipe, []), 2)[-1]
    size = largest_state_gb(job.plan, job.footprint)
    assert size > 0.0
    save_s = size / COPY_GB_PER_S + size / DISK_GB_PER_S
    assert late_stop(job, 30.0, None) is None
    assert late_stop(job, 30.0 - save_s, 60) is None
    line = late_stop(job, 31.0, 60)
    assert line is not None
    assert line.startswith(
        f"checkpoint.grace = 60: {job.name} takes about 62 s to stop, two steps of 31 s"
    )
