"""What the stages of a family must be to its schedule, to each other and to the patches of its networks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distill.listing.document import Loc, Problem
from distill.recipe.crop_rules import is_multiple


def family_stage_rules(
    parts: Mapping[Loc, Any], indices: Sequence[int], sides: Mapping[str, tuple[int, float]]
) -> Iterator[Problem]:
    """``indices`` of the stages; ``sides``: each network's stride and its scale of every crop."""
    names: set[str] = set()
    for index in indices:
        name = parts.get(("stages", index, "name"))
        if name in names:
            yield ("stages", index, "name"), f"{name!r} is taken: stages need different names"
        if name is not None:
            names.add(name)
        yield from _crop_rules(parts, index, sides)
    lengths: list[Any] = [parts.get(("stages", index, "steps")) for index in indices]
    total = parts.get(("schedule", "steps"))
    if not lengths or total is None or None in lengths:
        return
    if sum(lengths) != total:
        text = " + ".join(f"{each:,}" for each in lengths)
        yield (
            ("schedule", "steps"),
            f"{total:,}: the stages have {text} steps - did you mean {sum(lengths)}?",
        )


def _crop_rules(
    parts: Mapping[Loc, Any], index: int, sides: Mapping[str, tuple[int, float]]
) -> Iterator[Problem]:
    """Sizes of a stage's crops are multiples of the patch of every network that gets them."""
    listed = sorted({loc[3] for loc in parts if loc[:3] == ("stages", index, "crops") and loc[3:]})
    has_local = parts.get(("crops", "local", "count")) != 0
    for item in listed:
        for key in ("global", "local") if has_local else ("global",):
            key_path = ("stages", index, "crops", item, key)
            size = parts.get(key_path)
            for label, (stride, scale) in sides.items():
                is_given = key == "global" or label != "the teacher"
                if size is None or not is_given:
                    continue
                if not is_multiple(size * scale, stride):
                    of = "" if scale == 1.0 else f" times crop_scale {scale:g}"
                    yield key_path, f"{size}{of} is not a multiple of {stride} ({label})"
                    break
