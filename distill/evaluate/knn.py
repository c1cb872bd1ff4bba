"""How good a run's features are: k-NN on held-out images, beside three that learned nothing.

    for each held-out image:
        the k most similar training images vote for their class
    score = mean over the classes of the fraction of their images voted right (balanced accuracy)

A score means little alone, so each stands beside the same vote on raw pixels, on the colour
statistics of the image, and on the class tokens of an untrained copy of the same network.

Images are prepared as ``preprocessor_config.json`` instructs any other reader of the exported folder (a
teacher without one gets them as its run gave them): resized to its size without a crop, scaled and normalised. Only the teacher's, the students' and the
index files of the run folder are read, so ``distill eval`` repeats the scores on any machine.

Similarities are computed in fp64: with LayerScale at its initial 1e-5 the class tokens of an
untrained ViT differ in the fourth digit only, and fp32 cosines of them are all 1. A large network on a GPU
multiplies in bf16 and adds its blocks up in fp32, which keeps that digit; the summary then has ``knn_in``.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from distill.data.decode import Rgb, background_of
from distill.errors import UserError
from distill.evaluate.images import (
    Preparation,
    ReadSplit,
    Scored,
    count_images,
    extract,
    log,
    read_preparation,
    read_split,
    read_splits,
    scoring_dtype,
)
from distill.runfolder.status import KNN_K, TEACHER, write_json
from distill.weights.load import load_backbone
from students.shapes import BackboneSpec
from students.student import build_backbone

BASELINE_PX = (
    64  # pixels are compared at this size: 12,288 numbers an image, whatever the images are
)
SIMILARITY_ROWS = 1024  # held-out images compared with all training images at once
UNTRAINED_SEED = 0


def knn(
    train: Float[Tensor, "train width"],
    train_labels: Int64[Tensor, " train"],
    test: Float[Tensor, "test width"],
    test_labels: Int64[Tensor, " test"],
    k: int = KNN_K,
    *,
    measure: Literal["cosine", "euclidean"] = "cosine",
) -> float:
    """Balanced accuracy of the majority among the ``k`` most similar training images.

    A tie between classes goes to the one whose voters are more similar in sum. Classes without a
    held-out image do not count. Computed in fp64. No communication.

    Raises:
        ValueError: fewer than ``k`` training images, or no held-out image.
    """
    if len(train) < k:
        raise ValueError(f"k = {k}: must be at most the number of training images, {len(train)}")
    if not len(test):
        raise ValueError("no held-out image to score")
    num_classes = int(torch.cat([train_labels, test_labels]).max()) + 1
    train, test = train.double(), test.double()
    if measure == "cosine":
        train, test = (torch.nn.functional.normalize(rows, dim=1) for rows in (train, test))
    predicted = []
    for rows in torch.split(test, SIMILARITY_ROWS):
        similarity = rows @ train.T if measure == "cosine" else -torch.cdist(rows, train)
        nearest, index = similarity.topk(k, dim=1)
        votes_by_class = torch.nn.functional.one_hot(train_labels[index], num_classes).double()
        votes = votes_by_class.sum(1)  # [test, classes]
        support = (votes_by_class * nearest[..., None]).sum(1)
        has_most = votes == votes.amax(1, keepdim=True)
        predicted.append(support.masked_fill(~has_most, -torch.inf).argmax(1))
    return balanced_accuracy(torch.cat(predicted), test_labels)


def balanced_accuracy(
    predicted: Int64[Tensor, " images"], labels: Int64[Tensor, " images"]
) -> float:
    """Mean over the classes that occur in ``labels`` of the fraction predicted right."""
    num_classes = int(torch.maximum(predicted, labels).max()) + 1
    right = torch.bincount(labels[predicted == labels], minlength=num_classes).double()
    total = torch.bincount(labels, minlength=num_classes).double()
    occurs = total > 0
    return float((right[occurs] / total[occurs]).mean())


def pixels_score(train: ReadSplit, test: ReadSplit, k: int = KNN_K) -> float:
    """k-NN by Euclidean distance of the images themselves, at most 64 px on a side.

    Euclidean suits pixels better than cosine (0.38 against 0.22 on the bundled tiles), and a
    baseline is given its better distance.
    """
    known, query = (each.pixels.flatten(1).float() for each in (train, test))
    labels = train.split.labels, test.split.labels
    return knn(known, labels[0], query, labels[1], k, measure="euclidean")


def rgb_score(train: ReadSplit, test: ReadSplit, k: int = KNN_K) -> float:
    """k-NN by Euclidean distance of each image's mean and spread of red, green and blue.

    The six numbers are standardised by the training images.
    """
    sides = [rgb_stats(each.pixels) for each in (train, test)]
    centre, spread = sides[0].mean(0), sides[0].std(0).clamp_min(1e-6)  # fp32; grey images exist
    known, query = ((side - centre) / spread for side in sides)
    labels = train.split.labels, test.split.labels
    return knn(known, labels[0], query, labels[1], k, measure="euclidean")


def rgb_stats(images: UInt8[Tensor, "images 3 height width"]) -> Float[Tensor, "images 6"]:
    """Mean and standard deviation of each colour of each image, in fp32."""
    values = images.flatten(2).float()  # [images, 3, height * width]
    return torch.cat([values.mean(2), values.std(2, correction=0)], dim=1)


def evaluate_run(
    run_folder: Path,
    progress: Callable[[str], None] | None = None,
    *,
    teacher_folder: Path | None = None,
    specs: Mapping[str, BackboneSpec] | None = None,
    usual: Preparation | None = None,
    k: int = KNN_K,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """The run's summary with fresh scores, also written to ``summary.json``.

    Scores the teacher, every student, an untrained copy of each, raw pixels and colour statistics.
    What else the summary holds (loss, images/s, phases) is kept. Images without labels give no scores; ``knn`` is
    then None and ``knn_reason`` has the reason. ``progress`` gets what is next. ``teacher_folder`` is where a teacher
    that was not trained in this run lies, a folder or a file; ``specs`` say what custom students are. ``usual`` is how a network whose files state nothing gets
    its images, and the background of clear pixels for all; without it that is the mean of the teacher's files.
    Images that cannot be decoded are in no score and are listed under ``left_out_of_scores``.

    Raises:
        UserError: the folder holds no network, or no image index.
    """
    say = progress or log.info
    folders = network_folders(run_folder, teacher_folder or run_folder / "teacher")
    train, test, reason = read_splits(run_folder, k)
    summary = _read_summary(run_folder)
    for key in ("left_out_of_scores", "knn_reason"):
        summary.pop(key, None)
    untrained: dict[str, float | None] = {}
    first = read_preparation(next(iter(folders.values())), 1, usual)
    rgb = background_of("mean", first.mean) if usual is None else usual.background
    baselines: dict[str, Any] = {"pixels": None, "colour": None}
    if not reason:
        say("k-NN of raw pixels and of colours")
        train, test, reason = _score_baselines(train, test, k, rgb, baselines, summary)
    baselines["untrained"] = untrained
    for turn, (name, folder) in enumerate(folders.items(), start=1):
        entry = _summary_entry(summary, name, is_teacher=name == TEACHER)
        entry["knn"] = untrained[name] = None
        if not reason:
            what = f"k-NN of {name} and its untrained copy ({turn} of {len(folders)})"
            say(what)
            on_batch = count_images(say, what, 2 * (len(train.locations) + len(test.locations)))
            entry.pop("knn_in", None)
            entry["knn"], untrained[name], dtype = _network_scores(
                folder,
                (specs or {}).get(name),
                lambda path, stride: replace(read_preparation(path, stride, usual), background=rgb),
                (train, test),
                k,
                device or torch.device("cpu"),
                on_batch,
            )
            if dtype != torch.float32:
                entry["knn_in"] = str(dtype).removeprefix("torch.")
    summary["baselines"] = baselines
    if reason:
        summary["knn_reason"] = reason
    write_json(run_folder / "summary.json", summary)
    return summary


def _score_baselines(
    train: Scored,
    test: Scored,
    k: int,
    background: Rgb | None,
    baselines: dict[str, Any],
    summary: dict[str, Any],
) -> tuple[Scored, Scored, str]:
    """Fills in the baselines; the images that can be decoded, and why they cannot be scored ('' when they can)."""
    known, query = (read_split(split, BASELINE_PX, background) for split in (train, test))
    left_out = [asdict(each) for each in (*known.left_out, *query.left_out)]
    if left_out:
        summary["left_out_of_scores"] = left_out
    num_train, num_test = len(known.split.locations), len(query.split.locations)
    if num_train < k or not num_test:
        counts = f"{num_train} training and {num_test} held-out images can be decoded"
        return known.split, query.split, f"{counts}, too few for k-NN with k = {k}"
    baselines["pixels"] = pixels_score(known, query, k)
    baselines["colour"] = rgb_score(known, query, k)
    return known.split, query.split, ""


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


def _network_scores(
    folder: Path,
    spec: BackboneSpec | None,
    prepare: Callable[[Path, int], Preparation],
    splits: tuple[Scored, Scored],
    k: int,
    device: torch.device,
    on_batch: Callable[[int], None],
) -> tuple[float, float, torch.dtype]:
    """Scores of the exported network and of an untrained copy with a fixed seed, one after the other in memory; what they were computed in."""
    backbone, spec = load_backbone(folder, spec=spec, device=device)
    preparation = prepare(folder, spec.stride)
    dtype = scoring_dtype(spec.parameters, device)
    scores = []
    for is_trained in (True, False):
        if not is_trained:
            del backbone  # before the memory of the next is taken
            generator = torch.Generator().manual_seed(UNTRAINED_SEED)
            backbone = build_backbone(spec, generator, device).eval()
        how: dict[str, Any] = {"device": device, "dtype": dtype, "on_batch": on_batch}
        known, query = (extract(backbone, split.locations, preparation, **how) for split in splits)
        scores.append(knn(known, splits[0].labels, query, splits[1].labels, k))
    return scores[0], scores[1], dtype


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
