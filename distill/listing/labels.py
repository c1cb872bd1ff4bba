"""Which class an image is of, by the folders of its path, and whether its folder holds it out.

``train/`` and ``val/`` above class folders are no classes: the class is the next folder, and what lies in
``val/`` or ``test/`` is held out. They are known by their names, and only where every first folder has such a
name: a class of trains among others stays one.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from distill.listing.locations import Kind, Location
from distill.listing.passed_over import listed

TRAINED = frozenset({"train", "training"})
HELD_OUT = frozenset({"val", "valid", "validation", "test", "testing"})
PART = re.compile(rf"({'|'.join(sorted(TRAINED | HELD_OUT, key=len, reverse=True))})(?=[-_.]|$)")
MAX_LABEL = 1024  # bytes; longer ones are texts, not names of classes


def clean_label(text: str) -> str:
    """A label without edge spaces; empty where it is too long or more than a line."""
    label = text.strip()
    is_name = label.isprintable() or any("\udc80" <= letter <= "\udcff" for letter in label)
    is_short = len(label.encode("utf-8", "surrogateescape")) <= MAX_LABEL
    return label if is_name and is_short and not re.search(r"[\x00-\x1f]", label) else ""


def folders_of(location: Location) -> list[str]:
    """Folders of an image's name; none of a row, whose name is a number."""
    if location.kind is Kind.PARQUET:
        return []
    return [part for part in location.name.split("/")[:-1] if part not in ("", ".", "..")]


def class_depth(tops: frozenset[str], depth: int | None) -> int:
    """Which folder names the class, 1 for the first; 0 for none. ``tops`` are the first folders of all images."""
    if depth is not None:
        return depth
    return 2 if tops and all(top.lower() in TRAINED | HELD_OUT for top in tops) else 1


def held_out_folders(tops: frozenset[str], *, has_loose: bool, depth: int | None) -> frozenset[str]:
    """First folders whose images are held out; none where nothing would be left to train on."""
    if depth is not None or class_depth(tops, None) != 2:
        return frozenset()
    held_out = frozenset(top for top in tops if top.lower() in HELD_OUT)
    return held_out if has_loose or held_out < tops else frozenset()


def held_out_files(names: Sequence[str]) -> frozenset[str]:
    """Shards and tables that are held out by their first folder or the first word of their names, such as ``val-000.tar``."""
    words = {name: PART.match(name.split("/")[0].lower()) for name in names}
    if not all(words.values()):
        return frozenset()
    held_out = {name for name, word in words.items() if word is not None and word[1] in HELD_OUT}
    return frozenset(held_out) if len(held_out) < len(names) else frozenset()


def label_lines(counts: Mapping[str, int]) -> list[str]:
    """Lines to show about labels: images without one, classes of one image. ``counts`` are of images by label."""
    without, total = counts.get("", 0), sum(counts.values())
    classes = {label: count for label, count in counts.items() if label}
    if not classes:
        return []
    if len(classes) == 1:
        return [f"the only class is {next(iter(classes))}: there are no scores without a second"]
    lines = []
    if without:
        lines.append(
            f"{without:,} of {total:,} images have no label: they are trained on and left out of the scores"
        )
    single = sorted(label for label, count in classes.items() if count == 1)
    if single:
        verb = "class has" if len(single) == 1 else "classes have"
        lines.append(
            f"{len(single):,} {verb} one image, which is trained on, none held out: {listed(single)}"
        )
    return lines


def number_classes(labels: Sequence[str]) -> tuple[NDArray[np.int32] | None, tuple[str, ...]]:
    """Class numbers, when there are two classes at least, and names, those that are numbers in numeric order; -1 without a label."""
    names = sorted(
        set(labels) - {""},
        key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else 0, n),
    )
    if len(names) < 2:
        return None, tuple(names)
    order = {"": -1} | {name: index for index, name in enumerate(names)}
    return np.array([order[label] for label in labels], np.int32), tuple(names)
