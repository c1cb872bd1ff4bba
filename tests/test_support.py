"""Ranks of tests: forked from a server without threads, and shapes are checked on them."""

import sys
from pathlib import Path

import pytest
import torch

from teacher.gram import gram_sum
from tests.support.spawn import on_ranks


def threads_of_the_server() -> tuple[bool, int]:
    """Whether this rank was forked with everything imported, and how many threads its parent has."""
    parent = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[1]
    threads = len(list(Path(f"/proc/{parent}/task").iterdir()))
    return "tests.support.preload" in sys.modules, threads


def test_on_ranks__are_forked_from_a_server_without_threads() -> None:
    assert on_ranks(2, threads_of_the_server) == [(True, 1)] * 2


def gram_of(images: int) -> float:
    return float(gram_sum(torch.ones(2, 3, 4), torch.ones(images, 3, 4)))


def test_on_ranks__a_wrong_shape_is_refused_on_the_rank() -> None:
    assert on_ranks(1, gram_of, 2) == [0.0]
    with pytest.raises(AssertionError, match=r"Type-check error.*gram_sum"):
        on_ranks(1, gram_of, 3)
