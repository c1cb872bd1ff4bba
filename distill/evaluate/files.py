"""Scores of any networks on any images: exported folders, files of weights, networks of runs; nothing is written.

Images come from sources as a recipe names them. Labels are the class folders; folders named ``val`` or ``test``, or
else a fifth of each class, are held out, as in training (``distill.data.split``). Closeness is to the first network.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.data.build_index import build_index
from distill.data.split import split, why_nothing_is_held_out
from distill.errors import RecipeError
from distill.evaluate.run import decode_for, in_common, network_folders
from distill.evaluate.scoring import Images, Network, Wanted, score_networks
from distill.job.prepare import read_job
from distill.listing.decode import background_of
from distill.protocols.dense_tasks import DenseTasks, open_dense
from distill.protocols.images import (
    Preparation,
    Scored,
    read_preparation,
    splits_of,
    unlabelled,
)
from distill.protocols.sharing import ALONE, Sharing
from distill.recipe.keys import FamilyRecipe
from distill.weights.load import shape_of
from distill.weights.stated_inputs import stated_inputs
from students.shapes import BackboneSpec

JOB = "job.json"  # what makes a folder a run
HELD_OUT = 0.2  # of each class
USUAL_PX = 224
USUAL_MEAN, USUAL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def evaluate_files(
    paths: Sequence[Path],
    source: Path,
    wanted: Wanted,
    say: Callable[[str], None],
    device: torch.device,
    sharing: Sharing = ALONE,
) -> dict[str, Any]:
    """A summary as a run has it, every network under ``students``; ``images`` counts what was scored on.

    Collective over ``sharing``: the first rank has the scores, the others return nothing and say nothing.

    Raises:
        UserError: weights or images cannot be read.
    """
    say = say if sharing.is_first else lambda _: None
    networks = [network_of(name, path, spec, say) for name, path, spec in named_networks(paths)]
    say("listing and decoding images")
    networks = with_one_background(networks)
    rgb = networks[0].preparation.background
    dense = open_dense(wanted.dense, source, wanted.protocol, rgb) if wanted.dense else None
    images, _ = read_source(source, networks, wanted.k, dense, sharing)
    results = score_networks(
        networks, images, wanted, say, device=device, dense=dense, sharing=sharing
    )
    if not sharing.is_first:
        return {}
    summary: dict[str, Any] = {
        "data": str(source),
        "images": {"train": len(images.train.pixels), images.part: len(images.test.pixels)},
        "students": {},
        **in_common(networks, results),
    }
    for network in networks:
        voted = results.knn.get(network.name)
        entry = {"path": str(network.path), "knn": voted and voted.value, "loss": None}
        if network.name in results.computed_in:
            entry["knn_in"] = results.computed_in[network.name]
        summary["students"][network.name] = entry
    left_out = [*images.train.left_out, *images.test.left_out, *(dense.left_out if dense else ())]
    if left_out:
        summary["left_out_of_scores"] = [asdict(each) for each in left_out]
    if images.reason:
        summary["knn_reason"] = images.reason
    return summary


def named_networks(paths: Sequence[Path]) -> list[tuple[str, Path, BackboneSpec | None]]:
    """Name, path and shape, where it is known, of all networks; a run stands for its teacher and students.

    ``RUN:NAME`` is one network of a run. Two networks of one name are named by their paths; one that is given
    twice is there once.

    Raises:
        RecipeError: nothing is there, or the run has no network of that name.
    """
    found = list(dict.fromkeys(each for path in paths for each in _given(path)))
    counts = Counter(name for name, _, _ in found)
    return [(name if counts[name] == 1 else str(path), path, spec) for name, path, spec in found]


def _given(path: Path) -> list[tuple[str, Path, BackboneSpec | None]]:
    run, wanted = split_name(path)
    if not run.exists():
        fix = "Give a run folder, RUN:STUDENT, an exported folder or a file of weights."
        raise RecipeError(f"{path}: no such file or folder", fix=fix)
    if not (run / JOB).is_file():
        return [(run.name if run.is_dir() else run.stem, run, None)]
    job = read_job(run)
    students = job.recipe.students if isinstance(job.recipe, FamilyRecipe) else ()
    specs = {student.label: student.backbone_spec() for student in students}
    folders = network_folders(run, job.teacher_paths[0])
    if wanted and wanted not in folders:
        fix = f"Its networks: {', '.join(folders)}."
        raise RecipeError(f"{path}: the run has no network {wanted}", fix=fix)
    chosen = [wanted] if wanted else list(folders)
    return [(name, folders[name], specs.get(name)) for name in chosen]


def split_name(path: Path) -> tuple[Path, str]:
    """The folder of a run and the name behind its colon, empty without one."""
    run, _, name = str(path).rpartition(":")
    is_named = not path.exists() and run and (Path(run) / JOB).is_file()
    return (Path(run), name) if is_named else (path, "")


def network_of(
    name: str, path: Path, spec: BackboneSpec | None, say: Callable[[str], None]
) -> Network:
    """A network to score, with the preparation that its files state, or the usual one and a line."""
    spec = spec or shape_of(path)
    return Network(name, path, spec, stated_preparation(name, path, spec.stride, say))


def stated_preparation(
    name: str, path: Path, stride: int, say: Callable[[str], None]
) -> Preparation:
    """How a network's files want its images, or the usual way, which a line then states."""
    usual = Preparation(USUAL_PX // stride * stride, USUAL_MEAN, USUAL_STD)
    preparation = read_preparation(path, stride, usual)
    stated = stated_inputs(path)
    if stated.mean is None or stated.std is None or stated.size is None:
        say(f"{name}: {preparation.size} px, and mean and std of ImageNet where none are stated")
    return preparation


def with_one_background(networks: Sequence[Network]) -> list[Network]:
    """The networks with the background of the first, so that all of them get the same pictures."""
    rgb = background_of("mean", networks[0].preparation.mean)
    return [replace(n, preparation=replace(n.preparation, background=rgb)) for n in networks]


def read_source(
    source: Path,
    networks: Sequence[Network],
    k: int,
    dense: DenseTasks | None = None,
    sharing: Sharing = ALONE,
) -> tuple[Images, tuple[str, ...]]:
    """Images of a source, training and held-out, and the names of their classes; no map is an image.

    The images hold the reason where they have no scores.

    Raises:
        UserError: they cannot be read.
    """
    index = build_index([dense.folder if dense else source], max_bad_fraction=0.01)
    if dense and dense.maps:
        paths = (str(index.location(image)) for image in range(len(index)))
        is_picture = [path not in dense.maps for path in paths]
        index = index.subset(np.flatnonzero(is_picture))
    train, test = split(index, HELD_OUT)
    scored: tuple[Scored, Scored, str]
    if train.labels is None or test is None:
        reason = why_nothing_is_held_out(train, HELD_OUT)
        scored = Scored((), torch.zeros(0, dtype=torch.int64)), unlabelled(index), reason
    else:
        scored = splits_of(train, test, k)
        if scored[2]:
            scored = scored[0], unlabelled(index), scored[2]
    part = "images" if scored[2] else "held_out"
    pictures = dense.pictures if dense else None
    images = decode_for(
        networks, scored[:2], k, part=part, reason=scored[2], pictures=pictures, sharing=sharing
    )
    return images, index.class_names
