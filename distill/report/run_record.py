"""What the files of one run hold, for a page. Nothing of it runs code of a recipe, and none has to be there.

Paths below the folder that one stands in become relative and those of the home folder begin with ``~``: a page
that is sent to somebody has no name of a user in it.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.listing.document import RESOLVED, RESOLVED_TEACHER, read_document
from distill.runfolder.events import Event, read_events
from distill.runfolder.metrics import MetricsRow, read_rows
from distill.runfolder.progress import ScoredStep, read_progress
from distill.runfolder.status import TEACHER, PhaseStatus, Status, StatusFile

MOST_RECIPE_CHARACTERS = 60_000
MOST_HEADER_BYTES = 100_000_000  # of a file of tensors


@dataclass(frozen=True)
class RunRecord:
    """One run as its files describe it now; what is missing is empty, what is damaged is in ``problems``."""

    name: str
    status: Status | None
    summary: Mapping[str, Any]
    rows: Mapping[str, Sequence[MetricsRow]]
    progress: Sequence[ScoredStep]
    events: Sequence[Event]
    plan: Mapping[str, Any]
    times: Mapping[str, Any]
    job: Mapping[str, Any]
    environment: Mapping[str, Any]
    recipe: str
    resolved: Mapping[str, str]
    parameters: Mapping[str, int]
    picture: Path | None
    problems: Sequence[str]

    @property
    def students(self) -> list[str]:
        """Their names, in the order of the recipe where it is known."""
        known = list(self.summary.get("students", {}))
        return known or [name for name in self.rows if name != TEACHER]

    @property
    def phases(self) -> Sequence[PhaseStatus]:
        """All stretches of steps."""
        return () if self.status is None else self.status.phases

    def score(self, network: str) -> float | None:
        """The k-NN score that every run has."""
        entry = self.summary.get("students", {}).get(network)
        if network == TEACHER:
            entry = self.summary.get(TEACHER)
        value = entry.get("knn") if isinstance(entry, Mapping) else None
        return float(value) if isinstance(value, int | float) else None


def read_run(folder: Path) -> RunRecord:
    """Reads a run folder, of a run that works, ended or failed."""
    problems: list[str] = []
    status = None
    try:
        status = StatusFile(folder).read()
    except UserError as error:
        problems.append(error.message)
    summary = _json(folder / "summary.json", problems)
    names = _networks(folder, status, summary)
    rows = {name: _rows(folder, name, problems) for name in names}
    job = _json(folder / "job.json", problems)
    read_of = {name: _shortened(_json(folder / name, problems)) for name in FILES}
    return RunRecord(
        name=folder.resolve().name,
        status=status and Status.from_json(_shortened(status.to_json())),
        summary=_shortened(summary),
        rows={name: found for name, found in rows.items() if found},
        progress=read_progress(folder),
        events=[Event(**_shortened(vars(event))) for event in read_events(folder)],
        plan=read_of["plan.json"],
        times=read_of["timing.json"],
        job=_shortened(job),
        environment=read_of["env.json"],
        recipe=_recipe(folder),
        resolved=_resolved(folder, problems),
        parameters=_parameters(folder, names),
        picture=(folder / "features.png") if (folder / "features.png").is_file() else None,
        problems=_shortened(problems),
    )


FILES = ("plan.json", "timing.json", "env.json")


def _networks(folder: Path, status: Status | None, summary: Mapping[str, Any]) -> list[str]:
    """Names in an order that does not change: of the phases, of the summary, of files."""
    of_phases = [name for phase in (status.phases if status else ()) for name in phase.networks]
    of_files = sorted(path.stem for path in (folder / "metrics").glob("*.jsonl"))
    return list(dict.fromkeys([*of_phases, *summary.get("students", {}), *of_files]))


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
        return {}


def _rows(folder: Path, name: str, problems: list[str]) -> list[MetricsRow]:
    try:
        return read_rows(folder, name)
    except (UserError, OSError) as error:
        problems.append(str(error).splitlines()[0])
        return []


def _recipe(folder: Path) -> str:
    text = ""
    with suppress(OSError, ValueError):
        text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    more = "\n# ... shortened" if len(text) > MOST_RECIPE_CHARACTERS else ""
    short: str = _shortened(text[:MOST_RECIPE_CHARACTERS])
    return short + more


def _resolved(folder: Path, problems: list[str]) -> dict[str, str]:
    """Dotted key and value of every key, defaults too; those of the teacher that is trained begin with ``teacher:``."""
    found = {}
    for file, prefix in ((RESOLVED, ""), (RESOLVED_TEACHER, "teacher:")):
        if not (folder / file).is_file():
            continue
        try:
            values = read_document(folder / file).values
        except UserError as error:
            problems.append(error.message)
            continue
        found.update({prefix + key: _shortened(str(value)) for key, value in _flat(values, ())})
    return found


def _flat(value: Any, key: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Dotted keys and scalars; items of a list of mappings by their name."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, (*key, str(name)))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for position, item in enumerate(value):
            named = isinstance(item, Mapping) and (item.get("name") or item.get("arch"))
            yield from _flat(item, (*key, str(named or position)))
    else:
        yield ".".join(key), value


def _parameters(folder: Path, names: Sequence[str]) -> dict[str, int]:
    """Numbers in each network's exported weights, from the head of the file alone."""
    files = {name: folder / "students" / name / "model.safetensors" for name in names}
    files[TEACHER] = folder / TEACHER / "model.safetensors"
    counts = {}
    for name, path in files.items():
        with suppress(OSError, ValueError, KeyError, TypeError, struct.error):
            counts[name] = count_numbers(path)
    return counts


def count_numbers(path: Path) -> int:
    """How many numbers a file of tensors holds.

    Raises:
        OSError, ValueError, KeyError, TypeError, struct.error: it is none.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MOST_HEADER_BYTES:
            raise ValueError("not a file of tensors")
        header = json.loads(file.read(length))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for side in entry["shape"]:
                count *= int(side)
            total += count
    return total


def _shortened(value: Any) -> Any:
    """The same, with the folder one stands in, and the home folder, left out of every path."""
    if isinstance(value, str):
        here, home = f"{Path.cwd()}{os.sep}", f"{Path.home()}{os.sep}"
        short = value.replace(here, "") if len(here) > 1 else value
        return short.replace(home, "~/") if len(home) > 1 else short
    if isinstance(value, Mapping):
        return {key: _shortened(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_shortened(each) for each in value]
    return value
