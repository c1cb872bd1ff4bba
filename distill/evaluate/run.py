"""Scores of a run: its teacher, every student, an untrained copy of each, raw pixels and colour statistics.

Images are prepared as ``preprocessor_config.json`` instructs any other reader of the exported folder (a
teacher without one gets them as its run gave them): resized to its size without a crop, scaled and normalised.
Only the teacher's, the students' and the index files of the run folder are read, so ``distill eval`` repeats the
scores on any machine.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from distill.errors import UserError
from distill.evaluate.scoring import Images, Network, Results, Wanted, score_networks
from distill.listing.decode import background_of
from distill.protocols.images import (
    Pixels,
    Preparation,
    Scored,
    log,
    read_preparation,
    read_splits,
    read_unlabelled,
)
from distill.protocols.knn import BASELINE_PX
from distill.protocols.sharing import ALONE, Sharing, read_shared
from distill.runfolder.status import TEACHER, write_json
from distill.weights.load import shape_of
from students.shapes import BackboneSpec

FRESH = ("left_out_of_scores", "knn_reason", "scores", "agreement", "conclusion", "cost")


@dataclass(frozen=True)
class KnownNetworks:
    """What a job knows of its networks, whose files may not state it.

    ``teacher_folder``: where a teacher that was not trained in this run lies, a folder or a file. ``specs``: what
    custom students are. ``usual``: how a network whose files state nothing gets its images, and the background of
    clear pixels for all; without it that is the mean of the teacher's files.
    """

    teacher_folder: Path | None = None
    specs: Mapping[str, BackboneSpec] = field(default_factory=dict)
    usual: Preparation | None = None


def evaluate_run(
    run_folder: Path,
    progress: Callable[[str], None] | None = None,
    *,
    known: KnownNetworks = KnownNetworks(),  # frozen
    wanted: Wanted = Wanted(),  # noqa: B008  # frozen
    device: torch.device | None = None,
    sharing: Sharing = ALONE,
) -> dict[str, Any]:
    """The run's summary with fresh scores, also written to ``summary.json``.

    What else the summary holds (loss, images/s, phases) is kept. Images without labels give no scores; ``knn`` is
    then None and ``knn_reason`` has the reason. ``progress`` gets what is next. Images that cannot be decoded are in
    no score and are listed under ``left_out_of_scores``. Collective over ``sharing``: its first rank alone has the
    scores and writes them, the others return nothing.

    Raises:
        UserError: the folder holds no network, or no image index.
    """
    say = progress or log.info
    usual = known.usual
    folders = network_folders(run_folder, known.teacher_folder or run_folder / "teacher")
    first = read_preparation(next(iter(folders.values())), 1, usual)
    rgb = background_of("mean", first.mean) if usual is None else usual.background
    networks = []
    for name, folder in folders.items():
        spec = known.specs.get(name) or shape_of(folder)
        preparation = replace(read_preparation(folder, spec.stride, usual), background=rgb)
        networks.append(Network(name, folder, spec, preparation))
    summary = {key: value for key, value in _read_summary(run_folder).items() if key not in FRESH}
    say("decoding images")
    images = read_run_images(run_folder, networks, wanted.k, sharing)
    if left_out := [asdict(each) for each in (*images.train.left_out, *images.test.left_out)]:
        summary["left_out_of_scores"] = left_out
    device = device or torch.device("cpu")
    results = score_networks(networks, images, wanted, say, device=device, sharing=sharing)
    if not sharing.is_first:
        return {}
    _merge(summary, networks, results)
    if images.reason:
        summary["knn_reason"] = images.reason
    write_json(run_folder / "summary.json", summary)
    return summary


def read_run_images(
    run_folder: Path, networks: Sequence[Network], k: int, sharing: Sharing = ALONE
) -> Images:
    """Training and held-out images; all that are there where they cannot be scored."""
    train, test, reason = read_splits(run_folder, k)
    part = "held_out"
    if reason:
        test, part = read_unlabelled(run_folder)
    return decode_for(networks, (train, test), k, part=part, reason=reason, sharing=sharing)


def decode_for(
    networks: Sequence[Network],
    splits: tuple[Scored, Scored],
    k: int,
    *,
    part: str,
    reason: str,
    pictures: Pixels | None = None,
    sharing: Sharing = ALONE,
) -> Images:
    """Training and held-out images, decoded once for all networks and ranks."""
    train, test = splits
    sides = [network.preparation.size for network in networks]
    rgb = networks[0].preparation.background
    known, query = (
        read_shared(each, BASELINE_PX, rgb, sides, pictures=pictures, sharing=sharing)
        for each in (train, test)
    )
    num_train, num_test = len(known.pixels), len(query.pixels)
    if not reason and (num_train < k or not num_test):
        counts = f"{num_train} training and {num_test} held-out images can be decoded"
        reason = f"{counts}, too few for k-NN with k = {k}"
    return Images(known, query, part, reason)


def _merge(summary: dict[str, Any], networks: Sequence[Network], results: Results) -> None:
    """Puts results where readers of ``summary.json`` look for them."""
    for network in networks:
        name = network.name
        entry = _summary_entry(summary, name, is_teacher=name == TEACHER)
        voted = results.knn.get(name)
        entry["knn"] = voted and voted.value
        entry.pop("knn_in", None)
        if name in results.computed_in:
            entry["knn_in"] = results.computed_in[name]
    summary |= in_common(networks, results)


def in_common(networks: Sequence[Network], results: Results) -> dict[str, Any]:
    """Keys of a summary that are not of one network."""
    untrained = {network.name: results.untrained.get(network.name) for network in networks}
    baselines = {
        **{
            key: (vote := results.baselines.get(key)) and vote.value for key in ("pixels", "colour")
        },
        "untrained": {name: vote and vote.value for name, vote in untrained.items()},
    }
    return {
        "baselines": baselines,
        "agreement": results.agreement,
        "scores": results.scores,
        "conclusion": results.conclusion or None,
        **({"cost": results.cost} if results.cost else {}),
    }


def network_folders(run_folder: Path, teacher_folder: Path) -> dict[str, Path]:
    """Exported folder of each network by name: the teacher, which may be a file, under ``teacher``, then the students.

    Raises:
        UserError: nothing was exported here.
    """
    folders = {folder.name: folder for folder in sorted((run_folder / "students").glob("*"))}
    folders = {TEACHER: teacher_folder, **folders}
    folders = {
        name: folder
        for name, folder in folders.items()
        if (folder / "config.json").exists() or (name == TEACHER and folder.is_file())
    }
    if not folders:
        raise UserError(
            f"{run_folder}: no exported network in teacher/ or students/",
            fix="give the folder of a finished run, such as runs/quickstart.",
        )
    return folders


def _read_summary(run_folder: Path) -> dict[str, Any]:
    path = run_folder / "summary.json"
    summary: dict[str, Any] = {}
    if path.exists():
        summary = json.loads(path.read_text(encoding="utf-8"))
    return summary


def _summary_entry(summary: dict[str, Any], name: str, *, is_teacher: bool) -> dict[str, Any]:
    """The dictionary that holds a network's score, made when the summary lacks it."""
    if is_teacher:
        entry: dict[str, Any] = summary.setdefault("teacher", {})
        return entry
    student: dict[str, Any] = summary.setdefault("students", {}).setdefault(name, {})
    student.setdefault("loss", None)
    return student
