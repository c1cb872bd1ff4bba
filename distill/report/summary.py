"""After the last step: scores, the picture, ``summary.json``. Run again on a finished run, it writes the same."""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distill.data.index import ImageIndex
from distill.data.locations import Location, Reader
from distill.data.photographs import photograph_paths
from distill.engine.device import has_gpu
from distill.errors import UserError
from distill.evaluate.at_intervals import score_after
from distill.evaluate.milestones import write_after
from distill.evaluate.run import KnownNetworks, evaluate_run
from distill.evaluate.scoring import Wanted
from distill.export.licences import RECORD
from distill.job.origin import complete_cards, stored_licences
from distill.job.prepare import IMAGES, Job, read_job
from distill.job.to_data import decoding_of
from distill.listing.decode import Rgb, decode_rgb
from distill.protocols.images import PICTURE_LIMIT_S, Preparation
from distill.protocols.sharing import ALONE, Sharing
from distill.protocols.tasks import USUAL
from distill.recipe.inputs import DataSpec
from distill.recipe.keys import FamilyRecipe
from distill.recipe.types import BUILTIN_PHOTOGRAPHS
from distill.report.ending import write_ending
from distill.report.pictures import plot_features
from distill.runfolder.files import is_full
from distill.runfolder.metrics import read_rows
from distill.runfolder.parked import read_parked
from distill.runfolder.status import (
    TEACHER,
    TRAINED,
    Status,
    StatusFile,
    read_times,
    write_json,
)
from distill.screen.tables import unfinished_students
from distill.weights.containers import read_object
from distill.weights.load import load_backbone
from students.shapes import BackboneSpec

NUM_PHOTOGRAPHS = 4  # rows of the picture
ALIVE_S = 10.0  # between two signs of life while a network is scored


def finish(
    run_folder: Path,
    wanted: Wanted = Wanted(USUAL[1:]),  # noqa: B008  # frozen
    *,
    device: torch.device | None = None,
    sharing: Sharing = ALONE,
) -> dict[str, Any]:
    """Scores teacher and students, draws ``features.png``, writes ``summary.json`` and the final status.

    A disk without room for the picture costs the picture, not the run. A student that was never
    trained has no folder and no scores: its entry in the summary has 0 steps. ``device``: by default what the
    recipe asks for. Collective over ``sharing``, whose other ranks call ``finish_on_rank``.

    Raises:
        UserError: the run has not finished.
    """
    job = read_job(run_folder)
    status_file = StatusFile(run_folder)
    status = status_file.read()
    if status is None:
        raise _unfinished(f"{run_folder}: has no status, so it has not trained yet", job)
    entries = _entries(run_folder, job, status)
    timing = read_times(run_folder)
    trained = timing.get(status.phases[-1].name)
    known = _known(job, entries)
    images = run_folder / "data" / IMAGES
    summary: dict[str, Any] = {
        "images": read_object(images) if images.is_file() else {},
        "teacher": {},
        "students": entries,
        "licences": stored_licences(run_folder, job.recipe, job.teacher_recipe).to_json(),
        "images_per_s": trained and trained["images"] / trained["s"],
        "phases_s": {name: entry["s"] for name, entry in timing.items()},
    }
    write_json(run_folder / "summary.json", summary)
    device = device or torch.device("cuda" if has_gpu(job.recipe.engine.device) else "cpu")
    with _LiveStatus(status_file, status) as live:
        summary = evaluate_run(
            run_folder,
            live.show,
            known=known,
            wanted=wanted,
            device=device,
            sharing=sharing,
        )
        live.show("drawing features.png")
        messages = [*unfinished_students(summary), *_left_out(summary)]
        messages += write_after(run_folder, live.show)
        messages += score_after(run_folder, live.show)
        messages += plot_pictures(job, known.specs, NUM_PHOTOGRAPHS)
    messages += complete_cards(job, known.specs, summary)
    fates = {
        name: replace(network, state="parked") if entries.get(name, {}).get("parked") else network
        for name, network in status.networks.items()
    }
    ended = replace(status, networks=fates, work_done=1.0, eta_s=0.0)
    status_file.write(write_ending(run_folder, summary, ended, messages))
    return summary


def finish_on_rank(
    run_folder: Path, wanted: Wanted, device: torch.device, sharing: Sharing
) -> dict[str, Any]:
    """As ``finish`` on the first rank; the others share its work, write nothing and return nothing."""
    if sharing.is_first:
        return finish(run_folder, wanted, device=device, sharing=sharing)
    job, status = read_job(run_folder), StatusFile(run_folder).read()
    if status is not None:
        known = _known(job, _entries(run_folder, job, status))
        evaluate_run(
            run_folder, lambda _: None, known=known, wanted=wanted, device=device, sharing=sharing
        )
    return {}


def _entries(run_folder: Path, job: Job, status: Status) -> dict[str, dict[str, Any]]:
    """What is known of each student before it is scored."""
    students = job.recipe.students if isinstance(job.recipe, FamilyRecipe) else ()
    return {s.label: _entry(run_folder, s.label, status) for s in students}


def _known(job: Job, entries: Mapping[str, Mapping[str, Any]]) -> KnownNetworks:
    students = job.recipe.students if isinstance(job.recipe, FamilyRecipe) else ()
    specs = {s.label: s.backbone_spec() for s in students if entries[s.label]["steps"] != 0}
    data, background = job.recipe.data, decoding_of(job.recipe.data).background
    usual = Preparation(job.recipe.input_size_of(TEACHER), data.mean, data.std, background)
    return KnownNetworks(job.teacher_paths[0], specs, usual)


class _LiveStatus:
    """The status while networks are scored, renewed now and then: a large network may take minutes without a word."""

    def __init__(self, file: StatusFile, status: Status) -> None:
        self._file, self._status = file, replace(status, state="evaluating", message="")
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="live status", daemon=True)

    def show(self, text: str) -> None:
        """Replaces the message; what it was before is written no more."""
        with self._lock:
            self._status = replace(self._status, message=text, updated_unix=time.time())
            self._file.write(self._status)

    def __enter__(self) -> "_LiveStatus":
        self.show("")
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(ALIVE_S):
            self.show(self._status.message)


def _unfinished(what: str, job: Job) -> UserError:
    return UserError(what, fix=f"Let the run finish: {job.resume_command}")


def _entry(run_folder: Path, name: str, status: Status) -> dict[str, Any]:
    """What the summary holds of a student besides its scores: last loss, steps that made it, and why it is parked, if it is.

    Raises:
        UserError: the student is still to be trained.
    """
    parked = read_parked(run_folder, name)
    record = run_folder / "students" / name / RECORD
    entry = {"loss": _last_loss(run_folder, name), "parked": parked and asdict(parked)}
    if record.is_file():
        return {**entry, "steps": read_object(record).get("steps")}
    if parked is None and status.state not in TRAINED:
        raise UserError(
            f"{run_folder}: {name} is not exported yet, the run has not finished ({status.state})",
            fix=f"Let the run finish: {status.resume_command}",
        )
    return {**entry, "steps": 0, "knn": None}


def _last_loss(run_folder: Path, name: str) -> float | None:
    """None for a student that was parked before its first line."""
    rows = read_rows(run_folder, name)
    return rows[-1].loss if rows else None


def replot_pictures(run_folder: Path, count: int) -> list[str]:
    """Plots the pictures of a finished run anew, ``count`` of them; lines about what could not be.

    Raises:
        UserError: a network is not there.
    """
    job = read_job(run_folder)
    students = job.recipe.students if isinstance(job.recipe, FamilyRecipe) else ()
    folders = {s.label: run_folder / "students" / s.label for s in students}
    specs = {s.label: s.backbone_spec() for s in students if folders[s.label].is_dir()}
    return plot_pictures(job, specs, count)


def plot_pictures(job: Job, specs: Mapping[str, BackboneSpec], count: int) -> list[str]:
    """Writes ``features.png``, and what the page compares, of the teacher and the students that ``specs`` name."""
    run_folder, data = job.run_folder, job.recipe.data
    device = torch.device("cuda" if has_gpu(job.recipe.engine.device) else "cpu")
    networks = {"teacher": load_backbone(job.teacher_paths[0])[0].to(device)}
    for name, spec in specs.items():
        networks[name] = load_backbone(run_folder / "students" / name, spec=spec)[0].to(device)
    photographs = _photographs(
        run_folder, data.sources[0].path, decoding_of(data).background, count
    )
    return _plot(run_folder, networks, photographs, data)


def _plot(
    run_folder: Path,
    networks: Mapping[str, nn.Module],
    photographs: Sequence[np.ndarray[Any, np.dtype[np.uint8]]],
    data: DataSpec,
) -> list[str]:
    """Writes ``features.png``; a line where the disk has no room for it, or no image can be decoded."""
    picture = run_folder / "features.png"
    if not photographs:
        return [f"{picture.name} was not written: no image can be decoded"]
    try:
        plot_features(networks, photographs, picture, mean=data.mean, std=data.std)
    except OSError as error:
        if not is_full(error):
            raise
        reason = f"{picture.name} was not written ({error.strerror})"
        return [f"{reason}: make room and run `distill eval {run_folder}`"]
    return []


def _left_out(summary: dict[str, Any]) -> list[str]:
    """A line about images that are in no score; none where all are."""
    left_out = summary.get("left_out_of_scores", [])
    if not left_out:
        return []
    first, others = left_out[0], len(left_out) - 1
    more = f" and {others:,} more, see left_out_of_scores in summary.json" if others else ""
    return [f"left out of the scores, cannot be used: {first['sample']} ({first['reason']}){more}"]


def _photographs(
    run_folder: Path, source: str, background: Rgb | None, count: int
) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """A few photographs to look at: the bundled ones uncropped, or the user's images that can be decoded, evenly spaced."""
    if source == BUILTIN_PHOTOGRAPHS:
        paths = photograph_paths()
        names = dict.fromkeys(["astronaut", "chelsea", "coffee", "rocket", *paths])
        chosen: Iterable[Location] = [Location.of(paths[name]) for name in names]
    else:
        held_out = run_folder / "data" / "held_out"
        index = ImageIndex.load(held_out if held_out.is_dir() else run_folder / "data" / "train")
        step = max(1, len(index) // count)
        turns = (range(start, len(index), step) for start in range(step))  # later ones: instead
        chosen = (index.location(image) for turn in turns for image in turn)
    images: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    reader = Reader(limit_s=PICTURE_LIMIT_S)
    for location in chosen:
        try:
            images.append(decode_rgb(reader.read(location), background))
        except OSError:  # named where it was left out of the scores
            continue
        if len(images) == count:
            break
    return images
