"""How good a network's patch features are: a linear segmentation of mosaics whose masks are known.

    a mosaic    some images of different classes behind a Voronoi pattern; each patch has the class
                that covers most of it
    the probe   ridge regression from patch feature to class, in closed form, learned on mosaics of
                training images
    the score   mean intersection over union of the classes, on mosaics of held-out images

Nothing is drawn at random but from a fixed seed, so that networks and steps compare on the same
mosaics.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.data.locations import Reader
from distill.listing.decode import Rgb
from distill.protocols.images import BATCH, PICTURE_LIMIT_S, Preparation, Scored, decode
from distill.protocols.linear_maps import solve_ridge
from teacher.batch import Features, normalise
from teacher.gram import gram_sum

REGIONS = 6  # per mosaic
TILES = 2  # mosaic side in images; a region is filled by mirrored copies of one
NUM_TRAIN, NUM_TEST = 192, 96  # mosaics
SEED = 0


@dataclass(frozen=True)
class Mosaics:
    """Pixels and the class of every pixel."""

    images: UInt8[Tensor, "images 3 height width"]
    classes: Int64[Tensor, "images height width"]

    def patch_classes(self, stride: int) -> Int64[Tensor, "images patches"]:
        """The class that covers most of each patch, row-major; the smaller index where two cover the same."""
        blocks = self.classes.unfold(1, stride, stride).unfold(2, stride, stride).flatten(3)
        return blocks.mode(dim=3).values.flatten(1)


def compose(
    split: Scored,
    count: int,
    size: int,
    stride: int,
    *,
    seed: int = SEED,
    background: Rgb | None = None,
) -> Mosaics:
    """Mosaics of a split's images, at the size the networks are scored at times ``TILES``, a multiple of the patch."""
    rng = np.random.default_rng(seed)
    side = -(-TILES * size // stride) * stride
    reader, labels = Reader(limit_s=PICTURE_LIMIT_S), split.labels.numpy()
    known = np.unique(labels)
    images = np.empty((count, 3, side, side), np.uint8)
    classes = np.empty((count, side, side), np.int64)
    rows, columns = np.mgrid[:side, :side]
    for index in range(count):
        regions = min(REGIONS, len(known))
        chosen = rng.choice(known, regions, replace=False)
        points = rng.uniform(0, side, (regions, 2))
        squared = (rows[..., None] - points[:, 0]) ** 2 + (columns[..., None] - points[:, 1]) ** 2
        nearest = squared.argmin(axis=2)
        for region, label in enumerate(chosen):
            image = int(rng.choice(np.flatnonzero(labels == label)))
            inside = nearest == region
            pixels = decode(reader, split.locations[image], size, background).numpy()
            images[index][:, inside] = _mirrored(pixels, side)[:, inside]
            classes[index][inside] = label
    return Mosaics(torch.from_numpy(images), torch.from_numpy(classes))


def _mirrored(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The image and its mirror images side by side, without seams."""
    missing = side - pixels.shape[1]
    return np.pad(pixels, ((0, 0), (0, missing), (0, missing)), mode="symmetric")


@torch.inference_mode()
def patch_features(
    backbone: Callable[..., Features], mosaics: Mosaics, preparation: Preparation
) -> Float[Tensor, "images patches width"]:
    """Patch features of length 1, fp32 on the CPU."""
    device = next(backbone.parameters()).device if isinstance(backbone, nn.Module) else None
    parts = []
    for images in mosaics.images.split(max(1, BATCH // TILES**2)):
        pixels = normalise(images.to(device), preparation.mean, preparation.std, torch.float32)
        parts.append(backbone(pixels).patch_tokens.float().cpu())
    return nn.functional.normalize(torch.cat(parts), dim=2)


def segmentation_score(
    train: Float[Tensor, "train width"],
    train_classes: Int64[Tensor, " train"],
    test: Float[Tensor, "test width"],
    test_classes: Int64[Tensor, " test"],
) -> float:
    """Mean intersection over union of a linear probe, over the classes that occur in the test. In fp64.

    weights = (X'X + ridge I)^-1 X'Y with Y one-hot; a patch belongs to the class with the largest value.
    """
    num_classes = int(torch.cat([train_classes, test_classes]).max()) + 1
    known, query = (
        torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1).double() for rows in (train, test)
    )
    wanted = nn.functional.one_hot(train_classes, num_classes).double()
    predicted = (query @ solve_ridge(known.T @ known, known.T @ wanted)).argmax(dim=1)
    return mean_iou(predicted, test_classes)


def mean_iou(predicted: Int64[Tensor, " rows"], wanted: Int64[Tensor, " rows"]) -> float:
    """Intersection over union of every class that occurs in ``wanted``, averaged."""
    scores = []
    for label in wanted.unique().tolist():
        is_predicted, is_wanted = predicted == label, wanted == label
        both = (is_predicted & is_wanted).sum().item()
        scores.append(both / (is_predicted | is_wanted).sum().item())
    return sum(scores) / len(scores)


class DenseProbe:
    """Mosaics of one run, composed once."""

    def __init__(self, splits: Sequence[Scored], preparation: Preparation, stride: int) -> None:
        """``splits``: training and held-out images; ``preparation``, ``stride``: of the networks that will be scored."""
        self.mosaics = [
            compose(
                split,
                count,
                preparation.size,
                stride,
                seed=SEED + index,
                background=preparation.background,
            )
            for index, (split, count) in enumerate(zip(splits, (NUM_TRAIN, NUM_TEST), strict=True))
        ]
        self._classes = [each.patch_classes(stride).flatten() for each in self.mosaics]

    def score(
        self, backbone: nn.Module, preparation: Preparation
    ) -> tuple[float, Float[Tensor, "images patches width"]]:
        """Mean IoU on held-out mosaics, and the patch features it was found with."""
        known, query = (patch_features(backbone, each, preparation) for each in self.mosaics)
        score = segmentation_score(
            known.flatten(0, 1), self._classes[0], query.flatten(0, 1), self._classes[1]
        )
        return score, query


def drift(
    now: Float[Tensor, "images patches width"], before: Float[Tensor, "images patches width"]
) -> float:
    """Mean squared change of the cosine between two patches of an image: the Gram loss between two networks."""
    return float(gram_sum(now, before)) / len(now)
