"""Launches and bytes of a step do not grow unnoticed."""

import json

import pytest

from tests.support.step_budget import ACCEPT, FILE, counted_now, exceeded


@pytest.mark.slow
def test_budget__of_family_vit_grows_by_no_more_than_two_percent() -> None:
    now, budget = counted_now(), json.loads(FILE.read_text())
    assert now.keys() == budget.keys()
    assert not exceeded(now, budget), "\n".join(exceeded(now, budget))


def test_budget__a_growth_is_named_with_the_way_to_accept_it() -> None:
    budget = {"vits16": {"launches": 100, "other_bytes": 1000}}
    assert not exceeded({"vits16": {"launches": 102, "other_bytes": 500}}, budget)
    (line,) = exceeded({"vits16": {"launches": 103, "other_bytes": 1000}}, budget)
    assert "vits16: launches 103, the budget is 100" in line and ACCEPT in line
