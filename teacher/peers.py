"""Where a GPU waits for other ranks inside a stretch of work that is timed: marks in its stream, for which the host never waits.

A collective on a GPU returns at once; its stream stands until the last rank of the group has come. What
times a stretch of work opens ``timing_peers``, every collective of a training step is inside
``waiting_for_peers``, and the seconds between its marks are no work of this rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch


@runtime_checkable
class StreamMark(Protocol):
    """A place in a GPU's stream; ``torch.cuda.Event``."""

    def query(self) -> bool:
        """The stream has passed it."""
        ...

    def elapsed_time(self, end_event: Any, /) -> float:
        """Milliseconds from here to another one that was passed."""
        ...


StreamMarks = tuple[StreamMark, StreamMark]
# Of the stretches at work, innermost last. Of the process, since hooks of a backward pass run on a thread of torch's
_open: list[list[StreamMarks]] = []


@contextmanager
def timing_peers() -> Iterator[list[StreamMarks]]:
    """Collects the marks of the collectives that are launched inside."""
    marks: list[StreamMarks] = []
    _open.append(marks)
    try:
        yield marks
    finally:
        _open.pop()


@contextmanager
def waiting_for_peers(device: torch.device) -> Iterator[None]:
    """Marks a collective, with the transfer, where ``device`` is a GPU and something is timed."""
    if device.type != "cuda" or not _open:
        yield
        return
    start = mark()
    yield
    _open[-1].append((start, mark()))


def mark() -> StreamMark:
    """A mark in the current stream of the current GPU."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
