"""Keys that say what the networks see: images, crops, masks."""

import re
from collections.abc import Sequence
from typing import Annotated, Literal, Protocol, runtime_checkable

from pydantic import BeforeValidator, Strict

from distill.recipe.types import (
    Pair,
    Probabilities,
    Section,
    Triple,
    machine,
    science,
    size_mapping,
    source_mapping,
)


def _colour(value: object) -> object:
    """Writes ``#rrggbb`` out as three integers; ``mean`` and ``stored`` stay."""
    if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value):
        return tuple(bytes.fromhex(value[1:]))
    parts = list(value) if isinstance(value, list | tuple) else []
    is_colour = len(parts) == 3 and all(type(part) is int and 0 <= part <= 255 for part in parts)
    if is_colour or value in ("mean", "stored"):
        return value
    allowed = "mean, stored, '#rrggbb' in quotes, or [red, green, blue] from 0 to 255"
    raise ValueError(f"{value!r}: write {allowed}")


SAME_STATS = 5e-4  # two means or deviations that differ by less are one, written with other digits
Stats = tuple[float, float, float]
Rgb = Annotated[tuple[int, int, int], Strict(False)]


@runtime_checkable
class ImageStats(Protocol):
    """What some weights state about their images; None where they do not."""

    @property
    def mean(self) -> Stats | None:
        """Mean per RGB channel, 0 to 1."""

    @property
    def std(self) -> Stats | None:
        """Standard deviation per RGB channel, 0 to 1."""


def are_same(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two means, or deviations, are one."""
    return all(abs(a - b) < SAME_STATS for a, b in zip(ours, theirs, strict=True))


class GlobalCropsSpec(Section):
    """The two global crops of an image."""

    count: Literal[2] = science(
        2, description="Global crops per image. The losses compare two, so it is always 2."
    )
    size: int = science(
        256,
        ge=8,
        description="Side of a global crop in pixels, a multiple of every patch size. The default is the published one.",
    )
    scale: Pair = science(
        (0.32, 1.0),
        description="Smallest and largest part of the image's area that a global crop covers. The default is the published one.",
    )


class LocalCropsSpec(Section):
    """The local crops of an image."""

    count: int = science(
        8,
        ge=0,
        le=32,
        description="Local crops per image; 0 turns them off. The default is the published one.",
    )
    size: int = science(
        112,
        ge=8,
        description="Side of a local crop in pixels, a multiple of every patch size. The default is the published one.",
    )
    scale: Pair = science(
        (0.05, 0.32),
        description="Smallest and largest part of the image's area that a local crop covers. The default is the published one.",
    )


class CropsSpec(Section):
    """All crops; a bare number for a crop is its size. ``eval_size`` is the finished networks' input."""

    global_: Annotated[
        GlobalCropsSpec, BeforeValidator(size_mapping, json_schema_input_type=GlobalCropsSpec | int)
    ] = science(
        GlobalCropsSpec(),
        alias="global",
        description="The two global crops of an image; a bare number is their size.",
    )
    local: Annotated[
        LocalCropsSpec, BeforeValidator(size_mapping, json_schema_input_type=LocalCropsSpec | int)
    ] = science(
        LocalCropsSpec(), description="The local crops of an image; a bare number is their size."
    )
    flip: float = science(
        0.0,
        ge=0.0,
        le=1.0,
        description="Probability that a crop is mirrored left to right. The default 0 keeps left and right apart, as published.",
    )
    blur_sigma: Pair = science(
        (0.1, 2.0),
        description="Smallest and largest standard deviation of the blur, in pixels of the crop. The default suits crops of about 256 px.",
    )
    blur: Probabilities = science(
        (1.0, 0.1, 0.5),
        since=2,
        description="Probabilities that the first and second global crop and a local crop are blurred. The default is the papers'; the released networks had [0, 0.9, 0.5].",
    )
    contrast_about: Literal["mean", "middle"] = science(
        "mean",
        since=2,
        was={2: "middle"},
        description="What contrast turns about: the mean grey of a crop, or 128, which moves the mean of dark pictures. The default is the published one.",
    )
    eval_size: int | None = machine(
        None,
        ge=8,
        description="Side in pixels at which finished networks are scored and exported. Null means the size of global crops.",
    )

    @property
    def input_size(self) -> int:
        """Pixels per side that the finished networks are scored at and that their folders name."""
        return self.eval_size or self.global_.size


class MasksSpec(Section):
    """iBOT masks: share of global crops masked, and the range of their ratios."""

    probability: float = science(
        0.5,
        ge=0.0,
        le=1.0,
        description="Probability that a global crop is masked for iBOT. The default is the published one.",
    )
    ratio: Pair = science(
        (0.1, 0.5),
        description="Smallest and largest part of a masked crop's patches that is masked. The default is the published one.",
    )


class SourceSpec(Section):
    """A folder, ``.tar`` shards, a ``.txt`` list, a ``.parquet`` file, or ``builtin:photographs``."""

    path: str = machine(
        min_length=1,
        description="Folder, `.tar` shards, `.txt` list, `.parquet` file, or `builtin:photographs`.",
    )
    lister: str | None = machine(
        None,
        since=2,
        description="What lists the images of `path`: `tar`, `parquet`, or a lister of an installed package. Null means by the suffix of each file.",
    )
    weight: float | None = science(
        None,
        gt=0.0,
        description="Share of all images that come from this source, relative to the others. Null for all sources means one pool.",
    )
    batches: Literal["mixed", "pure"] = science(
        "mixed",
        description="`pure`: the source fills separate batches, in the share of its weight. `mixed`: it shares batches with others, the common case.",
    )
    label_depth: int | None = machine(
        None,
        since=2,
        ge=0,
        description="Which folder of an image's path below `path` names its class: 1 for the first, 0 for none. Null means the first, or the one below `train/` and `val/`.",
    )
    mean: Triple | None = science(
        None, description="Mean per RGB channel, 0 to 1, for this source. Null means `data.mean`."
    )
    std: Triple | None = science(
        None,
        description="Standard deviation per RGB channel, 0 to 1, for this source. Null means `data.std`.",
    )


class DataSpec(Section):
    """Images and how their pixels are normalised."""

    sources: Annotated[
        tuple[
            Annotated[
                SourceSpec, BeforeValidator(source_mapping, json_schema_input_type=SourceSpec | str)
            ],
            ...,
        ],
        Strict(False),
    ] = science(min_length=1, description="Where the images are; a bare text is a path.")
    index: str | None = machine(
        None,
        min_length=1,
        description="Folder for the index of the images, reused by later runs. Null means that each run indexes again.",
    )
    max_bad_fraction: float = machine(
        0.01,
        ge=0.0,
        le=1.0,
        description="Fraction of samples that may be unreadable before the run ends. The default tolerates a few broken files, not a wrong folder.",
    )
    max_megapixels: float = machine(
        64.0,
        gt=0.0,
        description="Largest image that is decoded, in millions of pixels. The default bounds memory and keeps out decompression bombs.",
    )
    held_out: float = science(
        0.2,
        ge=0.0,
        lt=1.0,
        description="Fraction of each class that is not trained on and scores the networks. The default leaves four fifths for training; 0 trains on all images, without scores.",
    )
    mean: Triple = science(
        (0.485, 0.456, 0.406),
        description="Mean per RGB channel, 0 to 1, subtracted from the pixels. The default is ImageNet's.",
    )
    std: Triple = science(
        (0.229, 0.224, 0.225),
        description="Standard deviation per RGB channel, 0 to 1, that pixels are divided by. The default is ImageNet's.",
    )
    background: Annotated[
        Literal["mean", "stored"] | Rgb,
        BeforeValidator(_colour, json_schema_input_type=Literal["mean", "stored"] | str | Rgb),
    ] = science(
        "mean",
        since=2,
        description="What transparent pixels are laid on: a colour, `[red, green, blue]` from 0 to 255 or `'#rrggbb'`; `mean` for `data.mean`; or `stored`, the colours hidden below them.",
    )
    decode: Literal["cpu", "gpu"] = science(
        "cpu",
        since=2,
        description="What decodes images. The default feeds a GPU with a core or two; `gpu` gives pixels that differ by a level or two.",
    )
    num_threads: int = machine(
        1,
        ge=1,
        description="Threads per rank that decode and resize images. The default 1 suits machines with one core per rank.",
    )

    @property
    def has_source_stats(self) -> bool:
        """Images are normalised by their source's mean and standard deviation, which travel with them."""
        return any(source.mean or source.std for source in self.sources)

    def describe_inputs(self, theirs: ImageStats | None) -> str:
        """How the images of some weights were normalised, where that is unlike the default or unlike here, as the end of a line."""
        if theirs is None or theirs.mean is None or theirs.std is None:
            return ""
        text = f"mean {list(theirs.mean)} and std {list(theirs.std)}"
        if not are_same(self.mean, theirs.mean) or not are_same(self.std, theirs.std):
            return f"; its images had {text}, here {list(self.mean)} and {list(self.std)}"
        usual = tuple(DataSpec.model_fields[key].default for key in ("mean", "std"))
        return "" if (self.mean, self.std) == usual else f"; images have its {text}"
