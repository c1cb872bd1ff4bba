"""Which images are trained on and which are held out to score networks on."""

from dataclasses import replace

import numpy as np

from distill.data.index import ImageIndex
from distill.data.stateless_random import mix


def split(index: ImageIndex, fraction: float) -> tuple[ImageIndex, ImageIndex | None]:
    """Images to train on, and those that are held out; always the same. None where nothing is.

    A source whose folders hold images out keeps its split; of the others a ``fraction`` of each class, chosen by a
    hash of their order, is held out, at most all but one. A fraction of 0 holds nothing out.
    """
    is_held_out = np.zeros(len(index), bool)
    is_free = np.ones(len(index), bool)
    if index.held_out is not None:
        is_held_out |= index.held_out
        for images in index.bounds:
            is_free[images.start : images.stop] = not is_held_out[images.start : images.stop].any()
    for label in range(0 if index.labels is None else len(index.class_names)):
        members = np.flatnonzero((index.labels == label) & is_free)
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        order = np.argsort(mix(np.arange(len(members))), kind="stable")
        is_held_out[members[order[: max(count, 0)]]] = True
    if not fraction or not is_held_out.any() or is_held_out.all():
        return index, None
    index = replace(index, held_out=None)  # the parts are not split again
    return index.subset(np.flatnonzero(~is_held_out)), index.subset(np.flatnonzero(is_held_out))


def why_nothing_is_held_out(index: ImageIndex, fraction: float) -> str:
    """The reason in words, of an index that ``split`` holds nothing out of."""
    if not fraction:
        return "data.held_out is 0, so no image is held out to score on"
    if index.labels is not None:
        return "every class has one image, so none is held out to score on"
    if index.class_names:
        return f"all labels name one class ({index.class_names[0]}), so k-NN cannot separate any"
    return "the images have no labels, so k-NN has no classes to vote"
