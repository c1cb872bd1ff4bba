"""Memory that nobody has written to, made visible."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uninitialized_memory_is_nan() -> Iterator[None]:
    """While inside, ``torch.empty`` and its kin give NaN, not what lay there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
