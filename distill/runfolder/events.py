"""What happened to a run, one line each: skipped steps, recomputed features, roll-backs, parked students, dead ranks, restarts, waits for storage.

    events.jsonl  appended to by any rank and by the launcher, each line in one write

A screen shows them as they come; afterwards they are the run's diary.
"""

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

FILE = "events.jsonl"
EventKind = Literal[
    "skipped",
    "recomputed",
    "rolled back",
    "out of memory",
    "parked",
    "died",
    "hung",
    "failed",
    "restarted",
    "storage",
    "not copied",
    "not compiled",
    "placed",
]


@dataclass(frozen=True)
class Event:
    """One thing that happened; ``network`` is empty where it is about no network."""

    kind: EventKind
    text: str
    network: str = ""
    step: int = 0
    time_unix: float = 0.0


def note(run_folder: Path, event: Event) -> None:
    """Appends an event; its time is now. Where there is no room for it, or the folder is gone, it is lost."""
    values = {**asdict(event), "time_unix": time.time()}
    with (
        suppress(OSError),
        (run_folder / FILE).open("ab", buffering=0) as file,
    ):
        file.write(json.dumps(values).encode() + b"\n")


def read_events(run_folder: Path, *, since_unix: float = 0.0) -> list[Event]:
    """The events from a time on; a line that is just being written comes next time, one that is damaged never."""
    path = run_folder / FILE
    if not path.is_file():
        return []
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    events = []
    for line in lines:
        with suppress(ValueError, TypeError):
            events.append(Event(**json.loads(line)))
    return [event for event in events if event.time_unix >= since_unix]
