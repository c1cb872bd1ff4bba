"""Students that train no more because of their faults: ``parked/NAME.json``, since which step and why.

A person may delete such a file to have the student tried again from its last checkpoint.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.runfolder.status import write_json

PARKED_EXIT_CODE = 5  # the job is finished, but not every student trained to its end


@dataclass(frozen=True)
class Parked:
    """Since which step of its phase a student is parked, and why."""

    step: int
    reason: str

    def describe(self) -> str:
        """Names both in one line."""
        return f"since step {self.step}: {self.reason}"


def is_parked(run_folder: Path, name: str) -> bool:
    """Returns whether a student is parked."""
    return _path(run_folder, name).exists()


def write_parked(run_folder: Path, name: str, parked: Parked) -> None:
    """Parks a student from the next start on."""
    path = _path(run_folder, name)
    path.parent.mkdir(exist_ok=True)
    write_json(path, asdict(parked))


def read_parked(run_folder: Path, name: str) -> Parked | None:
    """Returns why a student is parked; None where it is not. A file that cannot be read parks it all the same."""
    path = _path(run_folder, name)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Parked(int(values["step"]), str(values["reason"]))
    except (ValueError, KeyError, TypeError):
        return Parked(0, f"{path} cannot be read")


def _path(run_folder: Path, name: str) -> Path:
    return run_folder / "parked" / f"{name}.json"
