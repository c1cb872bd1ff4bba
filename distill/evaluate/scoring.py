"""Every network on the same images: each file decoded once, each network loaded once and then freed.

    for each network, trained and then as an untrained copy:
        features of training and held-out images
        the tasks that want labels
        closeness to the first network, the reference

Raw pixels and the colour statistics of an image stand beside them as floors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from distill.evaluate.conclusion import Voted, conclude_by_closeness, conclude_by_labels
from distill.evaluate.cost import (
    Cost,
    costs_to_json,
    describe_choice,
    measure_cost,
    measure_graphs,
    sensible_choices,
)
from distill.export.graphs import graphs_of
from distill.protocols.closeness import FEWEST_IMAGES, MUTUAL_K, closeness, effective_rank
from distill.protocols.dense_tasks import DENSE, DenseTasks
from distill.protocols.images import (
    Extracted,
    Precision,
    Preparation,
    ReadSplit,
    count_images,
    scoring_dtype,
)
from distill.protocols.knn import (
    balanced_accuracy,
    colour_rows,
    knn_votes,
    pixel_rows,
)
from distill.protocols.map_set import PatchNetwork
from distill.protocols.score import CannotScoreError, Protocol, Sample, Score
from distill.protocols.sharing import ALONE, Sharing, extract_shared
from distill.protocols.tasks import TASKS
from distill.runfolder.status import KNN_K, TEACHER
from distill.weights.load import load_backbone
from students.shapes import BackboneSpec
from students.student import build_backbone

UNTRAINED_SEED = 0
MOST_AGREEING = (
    2000  # images that closeness is computed on, evenly spaced: the square of it is held in fp64
)
KINDS = {"class": "class_token", "patch": "patch"}


@dataclass(frozen=True)
class Network:
    """A network to score: where its weights lie, what it is, and how it wants its images."""

    name: str
    path: Path
    spec: BackboneSpec
    preparation: Preparation


@dataclass(frozen=True)
class Images:
    """What to score on. Without labels all images are in ``test``, and ``reason`` has why nothing is scored by them."""

    train: ReadSplit
    test: ReadSplit
    part: str
    reason: str = ""


@dataclass(frozen=True)
class Wanted:
    """What to compute: ``tasks`` by class labels, ``dense`` ones by maps and key points. k-NN by the usual protocol (``k``) and closeness come with every evaluation."""

    tasks: Sequence[str] = ()
    protocol: Protocol = "quick"
    k: int = KNN_K
    has_cost: bool = False
    dense: Sequence[str] = ()
    precision: Precision = "auto"


@dataclass
class Results:
    """By network: k-NN scores, those of its untrained copy, of every task, and what it was computed in; and what all have in common."""

    knn: dict[str, Voted] = field(default_factory=dict)
    untrained: dict[str, Voted] = field(default_factory=dict)
    baselines: dict[str, Voted] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    computed_in: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, Any] = field(default_factory=dict)
    conclusion: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)


def score_networks(
    networks: Sequence[Network],
    images: Images,
    wanted: Wanted,
    say: Callable[[str], None],
    *,
    device: torch.device,
    dense: DenseTasks | None = None,
    sharing: Sharing = ALONE,
) -> Results:
    """Scores of every network; closeness is to the first of them.

    Collective over ``sharing``, whose ranks share the features; all but the first one get results that are empty.
    """
    results = Results()
    near = Nearness(images, networks[0].name)
    if not images.reason and sharing.is_first:
        say("k-NN of raw pixels and of colours")
        results.baselines.update(baseline_votes(images, wanted.k))
    for turn, network in enumerate(networks, start=1):
        what = f"k-NN of {network.name} and its untrained copy ({turn} of {len(networks)})"
        say(what)
        parts = [images.test] if images.reason else [images.train, images.test]
        total = 2 * sum(len(part.pixels) for part in parts)
        on_batch = count_images(say, what, total // sharing.num_ranks)
        dtype = scoring_dtype(network.spec.parameters, device, wanted.precision)
        if dtype != torch.float32:
            results.computed_in[network.name] = str(dtype).removeprefix("torch.")
        for is_trained in (True, False):
            backbone = _load(network, device, is_trained=is_trained)
            found = features_of(backbone, network, parts, device, on_batch, dtype, sharing)
            if not sharing.is_first:
                continue
            if is_trained and wanted.has_cost:
                say(f"cost of {network.name}")
                size = network.preparation.size
                cost = measure_cost(backbone, network.spec, size, device, dtype)
                graphs = graphs_of(network.name, network.path)
                timed = measure_graphs(graphs, network.spec, size)
                results.costs[network.name] = replace(cost, graphs=timed)
            near.add(network.name, found[-1], is_trained=is_trained)
            if not images.reason:
                _score(results, network.name, images, found, wanted, say, is_trained=is_trained)
            if dense is not None and (is_trained or wanted.protocol == "quick"):
                prepared, stride = network.preparation, network.spec.stride
                given = PatchNetwork(backbone, prepared, stride, device, dtype)
                _score_dense(results, network.name, given, dense, say, is_trained=is_trained)
            del backbone  # before the memory of the next is taken
    if not sharing.is_first:
        return results
    say("agreement with the teacher" if networks[0].name == "teacher" else "agreement")
    results.agreement.update(near.to_json())
    results.conclusion.update(_conclude(results, images))
    if wanted.has_cost:
        results.cost.update(_cost(results, images, networks[0].name, device))
    return results


def features_of(
    backbone: torch.nn.Module,
    network: Network,
    parts: Sequence[ReadSplit],
    device: torch.device,
    on_batch: Callable[[int], None] = lambda _: None,
    dtype: torch.dtype | None = None,
    sharing: Sharing = ALONE,
) -> list[Extracted]:
    """Features of each part by a network on ``device``; ``dtype``: of its matrix products, the usual one without.

    Collective over ``sharing``, as ``extract_shared``.
    """
    return [
        extract_shared(
            backbone,
            part,
            network.preparation,
            device=device,
            dtype=dtype or scoring_dtype(network.spec.parameters, device),
            on_batch=on_batch,
            sharing=sharing,
        )
        for part in parts
    ]


def _cost(results: Results, images: Images, reference: str, device: torch.device) -> dict[str, Any]:
    """Costs of all networks, and which to take of those beside the teacher."""
    students = {
        name: cost for name, cost in results.costs.items() if name != TEACHER or reference != name
    }
    labels, names, choice = images.test.split.labels, list[str](), ""
    if results.knn and (names := sensible_choices(students, results.knn, labels)):
        choice = describe_choice(names, results.costs, results.knn)
    return costs_to_json(results.costs, device, names, choice)


def _load(network: Network, device: torch.device, *, is_trained: bool) -> torch.nn.Module:
    """The network, or a copy with initial weights of a fixed seed."""
    if is_trained:
        return load_backbone(network.path, spec=network.spec, device=device)[0]
    generator = torch.Generator().manual_seed(UNTRAINED_SEED)
    return build_backbone(network.spec, generator, device).eval()


def _score(
    results: Results,
    name: str,
    images: Images,
    found: Sequence[Extracted],
    wanted: Wanted,
    say: Callable[[str], None],
    *,
    is_trained: bool,
) -> None:
    labels = images.train.split.labels, images.test.split.labels
    sample = Sample(found[0], labels[0], found[1], labels[1], wanted.protocol)
    votes = knn_votes(
        sample.train.class_token,
        sample.train_labels,
        sample.test.class_token,
        wanted.k,
    )
    voted = Voted(balanced_accuracy(votes, sample.test_labels), votes == sample.test_labels)
    (results.knn if is_trained else results.untrained)[name] = voted
    entries = results.scores.setdefault(name, {})
    for task in wanted.tasks:
        if not is_trained and not TASKS[task].is_quick:
            continue
        say(f"{TASKS[task].words} of {name}" + ("" if is_trained else ", untrained copy"))
        try:
            score: Score | None = TASKS[task].run(sample)
            entry: dict[str, Any] = {} if score is None else score.to_json()
        except CannotScoreError as error:
            entry = {"reason": str(error)}
        if is_trained:
            entries[task] = entry
        else:
            entries[task]["untrained"] = entry.get("value")


def _score_dense(
    results: Results,
    name: str,
    network: PatchNetwork,
    dense: DenseTasks,
    say: Callable[[str], None],
    *,
    is_trained: bool,
) -> None:
    entries = results.scores.setdefault(name, {})
    for task, opened in dense.tasks.items():
        what = f"{DENSE[task]} of {name}" + ("" if is_trained else ", untrained copy")
        say(what)
        score = opened.run(network, count_images(say, what, opened.pictures))
        if is_trained:
            entries[task] = score.to_json()
        else:
            entries[task]["untrained"] = score.value
    entries.update({task: {"reason": reason} for task, reason in dense.reasons.items()})


def baseline_votes(images: Images, k: int) -> dict[str, Voted]:
    """k-NN of raw pixels and of colour statistics, by Euclidean distance."""
    labels, wanted = images.train.split.labels, images.test.split.labels
    found = {}
    for name, rows in (("pixels", pixel_rows), ("colour", colour_rows)):
        votes = knn_votes(
            *_between(labels, rows(images.train, images.test)), k, measure="euclidean"
        )
        found[name] = Voted(balanced_accuracy(votes, wanted), votes == wanted)
    return found


def _between(labels: Tensor, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return rows[0], labels, rows[1]


def spaced(count: int) -> Int64[Tensor, " rows"]:
    """Positions of the images that closeness is computed on, evenly spaced among ``count``."""
    return torch.linspace(0, count - 1, min(count, MOST_AGREEING)).round().long()


class Nearness:
    """Features of the held-out images that closeness is computed on, network by network."""

    def __init__(self, images: Images, reference: str) -> None:
        self._rows = spaced(len(images.test.pixels))
        self._images, self._reference = images, reference
        self._trained: dict[str, dict[str, Tensor]] = {}
        self._untrained: dict[str, dict[str, Tensor]] = {}

    def add(self, name: str, found: Extracted, *, is_trained: bool) -> None:
        """Takes what it is going to compare from a network's features."""
        if len(self._rows) >= FEWEST_IMAGES:
            rows = {kind: getattr(found, key)[self._rows] for kind, key in KINDS.items()}
            (self._trained if is_trained else self._untrained)[name] = rows

    def to_json(self) -> dict[str, Any]:
        """Closeness of all to the reference, as ``summary.json`` holds it; or why there is none."""
        count = len(self._rows)
        if count < FEWEST_IMAGES:
            reason = (
                f"{count} images are too few to compare neighbours, {FEWEST_IMAGES} are the least"
            )
            return {"reason": reason}
        reference = self._trained[self._reference]
        networks: dict[str, Any] = {}
        for name, rows in self._trained.items():
            entry: dict[str, Any] = {"untrained": _near(self._untrained[name], reference)}
            if name == self._reference:
                entry |= {
                    kind: {"effective_rank": effective_rank(each)} for kind, each in rows.items()
                }
            else:
                entry |= _near(rows, reference)
            networks[name] = entry
        return {
            "reference": self._reference,
            "images": count,
            "part": self._images.part,
            "k": MUTUAL_K,
            "chance": MUTUAL_K / (count - 1),
            "networks": networks,
            "floors": {name: _near(rows, reference) for name, rows in self._floors().items()},
        }

    def _floors(self) -> dict[str, dict[str, Tensor]]:
        """Raw pixels and colours, centred, for class features alone: a patch has no pixels at one common size."""
        test = self._images.test
        pixels = pixel_rows(test, test)[1][self._rows]
        colour = colour_rows(test, test)[1][self._rows]
        return {"pixels": {"class": pixels - pixels.mean(0)}, "colour": {"class": colour}}


def _near(
    rows: Mapping[str, Float[Tensor, "images width"]],
    reference: Mapping[str, Float[Tensor, "images teacher_width"]],
) -> dict[str, dict[str, float]]:
    return {kind: asdict(closeness(each, reference[kind])) for kind, each in rows.items()}


def _conclude(results: Results, images: Images) -> dict[str, Any]:
    if results.knn:
        return conclude_by_labels(
            results.knn, results.untrained, results.baselines, images.test.split.labels
        ).to_json()
    if "networks" in results.agreement:
        found = conclude_by_closeness(results.agreement)
        return {} if found is None else found.to_json()
    return {}
