"""What all nodes of a launch have in common, and who is the odd one out."""

from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from distill.engine import nodes
from distill.engine.nodes import compare, examine_nodes, rounds_of, slow_ones
from distill.protocols.sharing import Sharing
from tests.support.command import Run
from tests.support.spawn import on_ranks


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_rounds__have_every_pair_once_and_no_node_twice(count: int) -> None:
    rounds = rounds_of(count)
    assert len(rounds) == (count - 1 if count % 2 == 0 else count) or count == 1
    for pairs in rounds:
        seen = [node for pair in pairs for node in pair]
        assert len(seen) == len(set(seen))
    found = sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs)
    assert found == list(combinations(range(count), 2))


def test_compare__names_who_has_something_else() -> None:
    facts = [{"torch": "2.13"}, {"torch": "2.12"}, {"torch": "2.13"}]
    found = compare(["gpu1", "gpu2", "gpu3"], facts)[0]
    assert not found.is_ok and found.found == "2.13 on most, 2.12 on gpu2"
    assert found.fix == "Make gpu2 as the others are."
    assert compare(["gpu1"] * 2, facts[::2])[0].found == "2.13 on all 2 ranks"


def test_slow_ones__are_below_most_of_the_median() -> None:
    found = slow_ones("products", "TFLOP/s", ["a", "b", "c"], [600.0, 580.0, 300.0])
    assert not found.is_ok and "300 on c" in found.found and found.fix
    assert slow_ones("products", "TFLOP/s", ["a", "b"], [600.0, 500.0]).is_ok


def look(root: str) -> list[dict[str, Any]]:
    """On three ranks, of which the last has another torch, a slow processor, a clock and a folder of its own."""
    sharing = Sharing(torch.distributed.get_rank(), torch.distributed.get_world_size())
    is_odd = sharing.rank == 2
    folder = Path(root) / ("elsewhere" if is_odd else "runs")
    real_facts, real_time = nodes._facts, nodes.time.time
    with (
        patch.object(nodes, "VISIBLE_S", 0.5),
        patch.object(nodes, "SENT_BYTES", {"cpu": 1 << 16}),
        patch.object(nodes.socket, "gethostname", lambda: f"gpu{sharing.rank}"),
        patch.object(nodes, "_product_rate", lambda _: 0.1 if is_odd else 1.0),
        patch.object(nodes, "_facts", lambda d: real_facts(d) | ({"torch": "1"} if is_odd else {})),
        patch.object(nodes.time, "time", lambda: real_time() - 90.0 * is_odd),
    ):
        return examine_nodes(folder, torch.device("cpu"), sharing)


@pytest.mark.slow
def test_examine_nodes__the_odd_rank_is_named_by_every_check(tmp_path: Path) -> None:
    first = on_ranks(3, look, str(tmp_path))[0]
    found = {each["what"]: each for each in first}
    pairs = "pairs by gloo"  # of a loaded machine, where one may be slow
    failed = {what for what, each in found.items() if not each["is_ok"] and what != pairs}
    folders = {what for what in found if what.startswith("folder")}
    assert {"torch", "clocks", "matrix products"} | folders == failed
    for what in failed:
        assert "gpu2" in found[what]["found"] and found[what]["fix"], found[what]
    assert {pairs, "all-reduce by gloo"} <= found.keys()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_doctor__compares_local_ranks_from_the_command_line(tmp_path: Path, distill: Run) -> None:
    result = distill("doctor", "--nodes", "--folder", tmp_path / "runs", "--ranks", 2)
    assert "ok    clocks: within" in result.out
    assert f"folder {tmp_path / 'runs'}: shared, a file is visible after" in result.out
    assert "pairs by gloo: median" in result.out
