"""What int8 changes of a network, measured on the images of its run when it is exported.

change   k-NN of the int8 graph beside that of the network, and mutual k-NN between the two
warning  k-NN falls by more than ``MOST_DROP``, or mutual k-NN is below ``LEAST_MUTUAL``
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.data.build_index import build_index
from distill.data.index import ImageIndex
from distill.errors import UserError
from distill.evaluate.run import read_run_images
from distill.evaluate.scoring import Images, Network, features_of, spaced
from distill.export.exporter import Exporter, Measured
from distill.export.graphs import Graph
from distill.export.int8 import INT8_FILE, require_quantiser, with_int8
from distill.export.to_onnx import FILE
from distill.listing.locations import Location
from distill.protocols.closeness import FEWEST_IMAGES, MUTUAL_K, mutual_knn
from distill.protocols.images import (
    BATCH,
    Extracted,
    Preparation,
    decode_images,
    read_preparation,
    unlabelled,
)
from distill.protocols.knn import knn
from distill.runfolder.status import KNN_K
from distill.weights.load import load_backbone, shape_of
from students.shapes import BackboneSpec
from teacher.batch import normalise

MOST_DROP, LEAST_MUTUAL = 0.02, 0.9
CALIBRATION_IMAGES = 256  # evenly spaced
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Change:
    """What int8 does to a network: k-NN before and after (None without labels), and mutual k-NN with it (None of few images)."""

    knn: float | None
    knn_int8: float | None
    mutual_class: float | None
    mutual_patch: float | None
    images: int

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for each limit that is passed."""
        lines = []
        if self.knn is not None and self.knn_int8 is not None:
            drop = self.knn - self.knn_int8
            if drop > MOST_DROP:
                lines.append(f"warning: int8 costs {drop:.3f} of k-NN, more than {MOST_DROP}")
        if self.mutual_class is not None and self.mutual_class < LEAST_MUTUAL:
            lines.append(
                f"warning: int8 keeps {self.mutual_class:.3f} of the nearest images, less than {LEAST_MUTUAL}"
            )
        return tuple(lines)

    def describe(self) -> str:
        """One clause for people."""
        parts = []
        if self.knn is not None and self.knn_int8 is not None:
            parts.append(f"k-NN {self.knn:.3f} to {self.knn_int8:.3f}")
        if self.mutual_class is not None and self.mutual_patch is not None:
            parts.append(
                f"mutual k-NN with fp32 {self.mutual_class:.3f} of class and {self.mutual_patch:.3f} of patch features"
            )
        return f"int8: {', '.join(parts) or 'too few images to measure'} ({self.images:,} images)"

    def to_json(self) -> dict[str, Any]:
        """As the record of an export holds it."""
        return {
            "images": self.images,
            "knn": {"fp32": self.knn, "int8": self.knn_int8, "k": KNN_K},
            "mutual_knn": {"class": self.mutual_class, "patch": self.mutual_patch, "k": MUTUAL_K},
        }


def int8_exporter(
    run_folder: Path,
    network: tuple[str, Path, BackboneSpec | None],
    usual: Preparation,
    calibrate: Path | None,
    say: Callable[[str], None],
) -> Exporter:
    """The format ``onnx`` with int8, calibrated on training images of the run or on a source, and measured on its held-out ones.

    ``network``: name, weights, and shape where it is known; ``usual``: how it gets its images where its files state nothing.

    Raises:
        UserError: images cannot be read.
    """
    require_quantiser()
    name, path, spec = network[0], network[1], network[2] or shape_of(network[1])
    preparation = replace(read_preparation(path, spec.stride, usual), background=usual.background)
    found = Network(name, path, spec, preparation)
    say(f"{name}: decoding images")
    folder = run_folder / "data" / "train"
    if calibrate is None and not folder.exists():
        fix = "Give pictures of the kind that the network will see: --calibrate SRC."
        raise UserError(f"{folder}: missing, so there are no images to calibrate on", fix=fix)
    index = (
        ImageIndex.load(folder)
        if calibrate is None
        else build_index([calibrate], max_bad_fraction=0.01)
    )
    images = read_run_images(run_folder, [found], KNN_K)
    pixels = [
        normalise(each, preparation.mean, preparation.std, dtype=torch.float32)
        for each in decode_images(_spaced(index), preparation, BATCH)
    ]
    say(f"{name}: quantising")
    exporter = with_int8(pixels)
    return replace(exporter, measure=partial(_measure, found, images))


def _spaced(index: ImageIndex) -> list[Location]:
    locations = unlabelled(index).locations
    step = max(1, len(locations) // CALIBRATION_IMAGES)
    return list(locations[::step][:CALIBRATION_IMAGES])


def _measure(network: Network, images: Images, folder: Path) -> Measured:
    change = measure_change(network, images, folder / INT8_FILE)
    size, before = ((folder / name).stat().st_size / 1e6 for name in (INT8_FILE, FILE))
    clause = f"{change.describe()}, {size:.1f} MB after {before:.1f} MB"
    left_out = "left out of int8: the patch embedding, norms, products of attention, results of matrix products"
    return Measured("int8", (clause, left_out), {"int8": change.to_json()}, clause, change.warnings)


def measure_change(network: Network, images: Images, path: Path) -> Change:
    """Compares an int8 graph with its network on the images of a run."""
    parts = [images.test] if images.reason else [images.train, images.test]
    backbones = (
        load_backbone(network.path, spec=network.spec)[0],
        Graph(path, network.spec.stride),
    )
    ours, theirs = (features_of(each, network, parts, CPU) for each in backbones)
    rows = spaced(len(parts[-1].pixels))
    near: dict[str, float | None] = {"class_token": None, "patch": None}
    if len(rows) >= FEWEST_IMAGES:
        near = {
            kind: mutual_knn(getattr(theirs[-1], kind)[rows], getattr(ours[-1], kind)[rows])
            for kind in near
        }
    before, after = (None if images.reason else _knn(each, images) for each in (ours, theirs))
    return Change(before, after, near["class_token"], near["patch"], len(rows))


def _knn(found: list[Extracted], images: Images) -> float:
    labels = images.train.split.labels, images.test.split.labels
    return knn(found[0].class_token, labels[0], found[1].class_token, labels[1])
