from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize("words", [("bench",), ("bench", "job"), ("bench", "loader")])
def test_bench__takes_a_recipe_in_the_first_place_for_a_job(
    distill: Any, tmp_path: Path, words: tuple[str, ...]
) -> None:
    ended = distill(*words, tmp_path / "nowhere.yaml")
    assert ended.code == 2 and "no such recipe file" in ended.err


def test_bench__loader_has_options_of_its_own(distill: Any) -> None:
    ended = distill("bench", "loader", "quickstart", "--sleep", "1")
    assert ended.code == 2 and "no such option" in ended.err
