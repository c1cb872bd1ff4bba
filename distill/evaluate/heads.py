"""Classifiers on a frozen network, fitted and scored by the tasks of ``distill eval``: the same images, split and code.

    knn      the training images vote by the protocol's k-NN; the files hold their class tokens and labels
    linear   the layer of the linear probe, on class token and mean patch

What was written is run on the held-out images: its predictions must be those of the score.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors.torch import load_file
from torch import Tensor

from distill.errors import RecipeError, UserError
from distill.evaluate.files import network_of, read_source, with_one_background
from distill.evaluate.scoring import Images, Network, features_of
from distill.export.classifiers import KnnHead, LinearHead
from distill.export.exporter import Exporter, Measured
from distill.export.heads import CLASSIFIER, FORMS, Classifier, read_logits, with_head
from distill.protocols.images import ReadSplit
from distill.protocols.knn import balanced_accuracy
from distill.protocols.knn_protocols import TEMPERATURE, score_knn
from distill.protocols.linear import fit_probe, score_linear
from distill.protocols.score import CannotScoreError, Protocol, Sample, Score
from distill.runfolder.status import KNN_K
from distill.weights.load import load_backbone
from students.shapes import BackboneSpec
from teacher.batch import normalise

MOST_OTHER = 0.01  # of the held-out predictions: features of two libraries differ in the last bits


def _fit_knn(sample: Sample, class_names: tuple[str, ...]) -> tuple[Score, Classifier]:
    score = score_knn(sample)
    k = int(score.settings["k"])
    temperature = None if sample.protocol == "quick" else TEMPERATURE
    known = sample.train.class_token, sample.train_labels
    head = KnnHead(*known, len(class_names), k, temperature)
    settings = {"protocol": sample.protocol, "k": k, "temperature": temperature}
    return score, Classifier("knn", head, class_names, settings)


def _fit_linear(sample: Sample, class_names: tuple[str, ...]) -> tuple[Score, Classifier]:
    score, probe = score_linear(sample), fit_probe(sample)
    head = LinearHead(probe.weight, probe.bias)
    settings = {"protocol": sample.protocol, "input": score.settings["input"]}
    return score, Classifier("linear", head, class_names[: len(probe.bias)], settings)


HEADS: Mapping[str, Callable[[Sample, tuple[str, ...]], tuple[Score, Classifier]]] = {
    "knn": _fit_knn,
    "linear": _fit_linear,
}


@dataclass(frozen=True)
class Fitted:
    """A classifier with its held-out score, and the images that it was fitted and scored on."""

    head: Classifier
    score: Score
    network: Network
    images: Images
    predicted: Int64[Tensor, " test"]
    source: str


def fit_head(
    kind: str,
    network: tuple[str, Path, BackboneSpec | None],
    source: Path,
    protocol: Protocol,
    say: Callable[[str], None],
) -> Fitted:
    """Fits a classifier on the labelled images of a source; ``network``: name, path, and shape where it is known.

    Raises:
        RecipeError: the head is not known.
        UserError: the images have no labels, or too few of a class.
    """
    if kind not in HEADS:
        raise RecipeError(f"--with-head {kind}: not known", fix=f"Take {' or '.join(HEADS)}.")
    networks = with_one_background([network_of(*network, say)])
    say(f"{network[0]}: listing and decoding images")
    images, class_names = read_source(source, networks, KNN_K)
    if images.reason:
        fix = "Give class folders, a table or shards with labels of two classes at least."
        raise UserError(f"--labels {source}: {images.reason}", fix=fix)
    found, device = networks[0], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(f"{network[0]}: features of {len(images.train.pixels) + len(images.test.pixels):,} images")
    backbone = load_backbone(found.path, spec=found.spec, device=device)[0]
    train, test = features_of(backbone, found, [images.train, images.test], device)
    labels = images.train.split.labels, images.test.split.labels
    say(f"{network[0]}: fitting {kind}")
    try:
        sample = Sample(train, labels[0], test, labels[1], protocol)
        score, head = HEADS[kind](sample, class_names)
    except CannotScoreError as error:
        raise UserError(f"--labels {source}: {error}", fix="Give more images.") from error
    predicted = head.module(test.class_token, test.mean_patch[:, None]).argmax(1)
    return Fitted(head, score, found, images, predicted, source.name)


def head_exporters(fitted: Fitted, forms: tuple[str, ...] = FORMS) -> list[Exporter]:
    """The formats with the classifier, each of which is run on the held-out images when it is written."""
    return [with_head(form, fitted.head, partial(_measure, fitted, form)) for form in forms]


def _measure(fitted: Fitted, form: str, folder: Path) -> Measured:
    """Predictions of the written files on the held-out images, beside those of the score.

    Raises:
        UserError: they are others.
    """
    score, count, labels = fitted.score, len(fitted.predicted), fitted.images.test.split.labels
    facts: dict[str, Any] = {
        "head": fitted.head.kind,
        "labels": fitted.source,
        "classes": len(fitted.head.class_names),
        "held_out": count,
        **score.to_json(),
    }
    task = f"{fitted.head.kind} ({score.protocol}) {score.value:.3f} on {count:,} held-out images"
    try:
        found = torch.cat([each.argmax(1) for each in _logits(fitted, form, folder)])
    except ImportError as error:
        facts |= {"equal": None, "reason": f"not run: {error}"}
        clause = f"{task}; the files were not run ({error})"
        return Measured("Classifier", (clause, *_names(fitted)), {"head": facts}, clause)
    equal = int((found == fitted.predicted).sum())
    value = _value(found, labels, score)
    facts |= {"equal": equal, "value_of_files": value}
    if equal < (1 - MOST_OTHER) * count:
        raise UserError(
            f"{fitted.network.name} as {form}-{fitted.head.kind}: {count - equal} of {count} held-out "
            f"predictions are not those of the score ({value:.3f} against {score.value:.3f})",
            fix="Report this line; nothing was written.",
        )
    clause = f"{task}, {value:.3f} by the files, {equal:,} of {count:,} predictions equal"
    return Measured("Classifier", (clause, *_names(fitted)), {"head": facts}, clause)


def _names(fitted: Fitted) -> tuple[str, ...]:
    names = fitted.head.class_names
    fit = f"fitted on {len(fitted.images.train.pixels):,} images of {fitted.source}"
    return (
        fit,
        f"{len(names):,} classes: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}",
    )


def _value(predicted: Tensor, labels: Tensor, score: Score) -> float:
    if score.settings["average"] == "classes":
        return balanced_accuracy(predicted, labels)
    return float((predicted == labels).double().mean())


def _logits(fitted: Fitted, form: str, folder: Path) -> Iterator[Tensor]:
    """Logits of the held-out images by the files."""
    network, head = fitted.network, fitted.head
    exporter = with_head(form, head, lambda _: Measured())
    if form == "onnx":
        run = read_logits(folder)
    else:
        forward = exporter.read_back(folder, network.spec.stride)

        written = copy.deepcopy(head.module)
        written.load_state_dict(load_file(folder / CLASSIFIER))

        def run(pixels: Tensor) -> Tensor:
            return written(*forward(pixels))

    with torch.no_grad():
        for pixels in prepared(fitted.images.test, network):
            yield run(pixels)


def prepared(split: ReadSplit, network: Network) -> Iterator[Float[Tensor, "batch 3 side side"]]:
    """Batches of a split as the network takes them, fp32."""
    mean, std = network.preparation.mean, network.preparation.std
    for images in split.batches(network.preparation):
        yield normalise(images, mean, std, dtype=torch.float32)
