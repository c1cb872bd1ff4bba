"""Keys that say what the networks see: images, crops, masks."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Strict

from distill.recipe.types import (
    Pair,
    Section,
    Triple,
    machine,
    science,
    size_mapping,
    source_mapping,
)


class GlobalCropsSpec(Section):
    """The two global crops of an image."""

    count: Literal[2] = science(2)
    size: int = science(256, ge=8)
    scale: Pair = science((0.32, 1.0))


class LocalCropsSpec(Section):
    """The local crops of an image."""

    count: int = science(8, ge=0, le=32)
    size: int = science(112, ge=8)
    scale: Pair = science((0.05, 0.32))


class CropsSpec(Section):
    """All crops; a bare number for a crop is its size. ``eval_size`` is the finished networks' input."""

    global_: Annotated[GlobalCropsSpec, BeforeValidator(size_mapping)] = science(
        GlobalCropsSpec(), alias="global"
    )
    local: Annotated[LocalCropsSpec, BeforeValidator(size_mapping)] = science(LocalCropsSpec())
    flip: float = science(0.0, ge=0.0, le=1.0)
    blur_sigma: Pair = science((0.1, 2.0))
    eval_size: int | None = machine(None, ge=8)

    @property
    def input_size(self) -> int:
        """Pixels per side that the finished networks are scored at and that their folders name."""
        return self.eval_size or self.global_.size


class MasksSpec(Section):
    """iBOT masks: share of global crops masked, and the range of their ratios."""

    probability: float = science(0.5, ge=0.0, le=1.0)
    ratio: Pair = science((0.1, 0.5))


class SourceSpec(Section):
    """A folder, ``.tar`` shards, a ``.txt`` list, a ``.parquet`` file, or ``builtin:photographs``.

    ``weight``: its share of all images; without, sources are one pool. ``batches: pure``: its images fill
    separate batches, in the share of its weight; those of the others are mixed. ``mean`` and ``std``
    replace the data's for its images.
    """

    path: str = machine(min_length=1)
    weight: float | None = science(None, gt=0.0)
    batches: Literal["mixed", "pure"] = science("mixed")
    mean: Triple | None = science(None)
    std: Triple | None = science(None)


class DataSpec(Section):
    """Images and how their pixels are normalised.

    ``index``: a folder in which what is known about the images is kept from run to run.
    """

    sources: Annotated[
        tuple[Annotated[SourceSpec, BeforeValidator(source_mapping)], ...], Strict(False)
    ] = science(min_length=1)
    index: str | None = machine(None, min_length=1)
    max_bad_fraction: float = machine(0.01, ge=0.0, le=1.0)
    max_megapixels: float = machine(64.0, gt=0.0)
    held_out: float = science(0.2, gt=0.0, lt=1.0)
    mean: Triple = science((0.485, 0.456, 0.406))
    std: Triple = science((0.229, 0.224, 0.225))
    num_threads: int = machine(1, ge=1)

    @property
    def has_source_stats(self) -> bool:
        """Images are normalised by their source's mean and standard deviation, which travel with them."""
        return any(source.mean or source.std for source in self.sources)
