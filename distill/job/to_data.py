"""Recipe and images to a loader: which samples, which crops, and where bad ones are named."""

from collections.abc import Callable
from pathlib import Path

import torch

from distill.data.bad_samples import BadSamples
from distill.data.crops import CropSchedule
from distill.data.feed import Feed
from distill.data.index import ImageIndex
from distill.data.loader import Loader, refused_gpu
from distill.data.sampler import BatchSizes, Pool, Sampler
from distill.listing.decode import Decoding, background_of
from distill.recipe.inputs import DataSpec
from distill.recipe.keys import FamilyRecipe, TeacherRecipe

Recipe = FamilyRecipe | TeacherRecipe


def pools_of(data: DataSpec, index: ImageIndex) -> list[Pool]:
    """What the sampler draws from: each source by its weight, or all as one."""
    if data.sources[0].weight is None:
        return [Pool(0, len(index))]
    has_stats = data.has_source_stats
    return [
        Pool(
            images.start,
            images.stop,
            source.weight or 0.0,
            source.batches == "pure",
            (source.mean or data.mean, source.std or data.std) if has_stats else None,
        )
        for source, images in zip(data.sources, index.bounds, strict=True)
    ]


def decoding_of(data: DataSpec) -> Decoding:
    """How a recipe's images are drawn, in training as in scores and pictures."""
    return Decoding(data.max_megapixels, background_of(data.background, data.mean))


def batch_sizes(recipe: Recipe) -> BatchSizes:
    """Images per batch, and from which step on."""
    if isinstance(recipe, FamilyRecipe):
        stages = recipe.parts
        return tuple((recipe.first_step(s), recipe.at_stage(s).schedule.batch) for s in stages)
    return tuple(
        (recipe.first_step(stage), recipe.at_stage(stage).schedule.batch) for stage in recipe.stages
    )


def build_feed(
    recipe: Recipe,
    index: ImageIndex,
    crops: CropSchedule,
    names: Path | None,
    positions: Callable[[int], range],
    stop_step: int,
) -> Feed:
    """Prepares the recipe's batches at some positions; ``names`` is the file that bad samples are named in."""
    data = recipe.data
    return Feed(
        index,
        crops,
        Sampler(pools_of(data, index), recipe.seed, batch_sizes(recipe)),
        BadSamples(names, data.max_bad_fraction),
        positions=positions,
        stop_step=stop_step,
        decoding=decoding_of(data),
    )


def build_loader(
    recipe: Recipe, feed: Feed, crops: CropSchedule, max_images: int, device: torch.device
) -> Loader:
    """Decodes what a feed prepares.

    Raises:
        SetupError: a GPU is to decode where none computes.
    """
    threads, decode = recipe.data.num_threads, recipe.data.decode
    if decode == "gpu" and device.type != "cuda":
        raise refused_gpu("nothing computes on a GPU")
    return Loader(
        feed, crops, max_images=max_images, num_threads=threads, device=device, decode=decode
    )
