"""Vectors of numbers that ranks share: blocks whose size depends on no rank, sums that no order of addition changes.

A block is BLOCK_ROWS rows. No block is divided between ranks, so that every product has the same shape on any number of ranks and
gives the same bits. Sums are of integers: a number is multiplied by a power of two and rounded (``to_fixed``). Integers of 64 bits
add up exactly, so that sums over blocks, ranks and threads are the same in every order; sums in fp64 would not be. For
vectors of length 1 and 17 billion rows a number keeps 28 bits after the point, for a million rows 42: more than fp32 has.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from distill.runfolder.files import replaced

BLOCK_ROWS = 1024
FIXED_BITS = 62  # of a sum, without its sign; one is left free


@runtime_checkable
class Vectors(Protocol):
    """Numbers in rows, all of them readable on every rank."""

    @property
    def num_rows(self) -> int:
        """How many there are."""

    @property
    def width(self) -> int:
        """Numbers of a row."""

    def block(self, begin: int, end: int) -> Float[Tensor, "rows width"]:
        """Vectors from ``begin`` to before ``end`` in fp32."""


@dataclass(frozen=True)
class VectorsInMemory:
    """Vectors of a tensor in fp32."""

    values: Float[Tensor, "rows width"]

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.values)

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.values.shape[1]

    def block(self, begin: int, end: int) -> Float[Tensor, "rows width"]:
        """Vectors from ``begin`` to before ``end``, not copied."""
        return self.values[begin:end]


def rank_blocks(num_rows: int) -> Iterator[tuple[int, int]]:
    """The blocks of this rank, as their first row and the row after their last; contiguous, as even as blocks can be."""
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if is_shared() else (0, 1)
    num_blocks = math.ceil(num_rows / BLOCK_ROWS)
    for block in range(num_blocks * rank // num_ranks, num_blocks * (rank + 1) // num_ranks):
        yield block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, num_rows)


def is_shared() -> bool:
    """Whether several ranks share the rows."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Whether this rank writes what all have."""
    return not is_shared() or dist.get_rank() == 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum over ranks in place: one all-reduce. Exact for integers, and where all ranks but one hold zeros."""
    if is_shared():
        dist.all_reduce(value)
    return value


def write_array(path: Path, values: np.ndarray) -> None:
    """Writes an ``.npy`` file, which gets its name when it is complete and synced; no objects."""
    with replaced(path) as aside, aside.open("wb") as file:
        np.save(file, values, allow_pickle=False)


def take_rows(rows: Vectors, wanted: Int64[np.ndarray, " wanted"]) -> Float[Tensor, "wanted width"]:
    """The rows of ascending numbers ``wanted``, on every rank: each reads those of its blocks, then one all-reduce."""
    taken = torch.zeros(len(wanted), rows.width)
    for begin, end in rank_blocks(rows.num_rows):
        first, after = np.searchsorted(wanted, (begin, end))
        if first < after:
            inside = torch.from_numpy(wanted[first:after] - begin)
            taken[first:after] = rows.block(begin, end)[inside]
    return sum_over_ranks(taken)


def in_memory(rows: Vectors, wanted: Int64[np.ndarray, " wanted"]) -> VectorsInMemory:
    """The rows of ascending numbers ``wanted``, in the memory of every rank."""
    return VectorsInMemory(take_rows(rows, wanted))


def bits_after_the_point(num_rows: int, largest: float) -> int:
    """How many bits a number may keep so that the sum of ``num_rows`` numbers up to ``largest`` fits."""
    return (
        FIXED_BITS
        - math.ceil(math.log2(max(num_rows, 2)))
        - max(0, math.ceil(math.log2(max(largest, 1e-30))))
    )


def to_fixed(values: Float[Tensor, "rows width"], bits: int) -> Int64[Tensor, "rows width"]:
    """Numbers times 2^bits, rounded to integers."""
    return (values.double() * 2.0**bits).round_().long()
