"""One evaluation on several ranks: each decodes and embeds its part of the images, and all get all rows.

    rank r    decodes images r, r + n, ...   embeds batches r, r + n, ...   (n ranks)
    then      the parts are added up: each rank has zeros where others have values

Batches are those of one process, so that features have the same bits on any number of ranks.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.listing.decode import Rgb
from distill.protocols.images import (
    BATCH,
    POINT_SEED,
    Extracted,
    LeftOut,
    Pixels,
    Preparation,
    ReadSplit,
    Scored,
    extract_all,
    read_split,
    sides_in_memory,
)


@dataclass(frozen=True)
class Sharing:
    """This rank among those that score together. Alone it sends nothing; else the default group's backend is gloo."""

    rank: int = 0
    num_ranks: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank computes scores from features, and writes them."""
        return self.rank == 0

    def gathered(self, value: Any) -> list[Any]:
        """The values of all ranks by rank. Collective: an all-gather of small objects."""
        if self.num_ranks == 1:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def filled(self, values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
        """All ``num_rows`` rows, of which this rank has the ``values`` at ``rows``. Collective: an all-reduce."""
        everyone = values.new_zeros(num_rows, *values.shape[1:])
        everyone[rows] = values
        if self.num_ranks > 1:
            dist.all_reduce(everyone)
        return everyone


ALONE = Sharing()


def read_shared(
    split: Scored,
    size: int,
    background: Rgb | None,
    others: Iterable[int] = (),
    *,
    pictures: Pixels | None = None,
    sharing: Sharing = ALONE,
) -> ReadSplit:
    """As ``read_split``, each image decoded by one rank; every rank then holds the pixels of all.

    Raises:
        UserError: as ``read_split``.
    """
    sides = sides_in_memory(len(split.locations), size, others)
    local = list(range(sharing.rank, len(split.locations), sharing.num_ranks))
    part = Scored([split.locations[image] for image in local], split.labels[local])
    read = read_split(part, size, background, sides, pictures=pictures)
    if sharing.num_ranks == 1:
        return read
    bad = {each.sample for each in read.left_out}
    found = [image for image in local if str(split.locations[image]) not in bad]
    named = [(i, str(split.locations[i])) for i in local if i not in {*found}]
    reasons = {each.sample: each.reason for each in read.left_out}
    gathered = sharing.gathered((found, [(i, LeftOut(name, reasons[name])) for i, name in named]))
    good = sorted(image for images, _ in gathered for image in images)
    rows = torch.searchsorted(torch.tensor(good), torch.tensor(found, dtype=torch.int64))
    pixels, *more = (
        sharing.filled(each, rows, len(good)) for each in (read.pixels, *read.others.values())
    )
    left_out = sorted((each for _, names in gathered for each in names), key=lambda each: each[0])
    decoded = Scored([split.locations[image] for image in good], split.labels[good])
    others_read = dict(zip(read.others, more, strict=True))
    return ReadSplit(decoded, pixels, tuple(each for _, each in left_out), others_read)


def extract_shared(
    backbone: nn.Module,
    read: ReadSplit,
    preparation: Preparation,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[int], None] = lambda _: None,
    sharing: Sharing = ALONE,
) -> Extracted:
    """As ``extract_all`` of a split, each batch embedded by one rank; every rank then has the features of all."""
    num_rows = len(read.pixels)
    generator = torch.Generator().manual_seed(POINT_SEED)
    points = torch.rand(num_rows, 2, generator=generator, dtype=torch.float64)
    turns = torch.arange(num_rows) // BATCH % sharing.num_ranks
    rows = torch.nonzero(turns == sharing.rank).flatten()
    batches = read.batches(preparation, BATCH, owned=(sharing.rank, sharing.num_ranks))
    found = None
    if len(rows):
        found = extract_all(
            backbone,
            batches,
            preparation,
            device=device,
            dtype=dtype,
            on_batch=on_batch,
            points=points[rows],
        )
    if sharing.num_ranks == 1 and found is not None:
        return found
    width = next(each for each in sharing.gathered(found and found.class_token.shape[1]) if each)
    nothing = torch.zeros(0, width)
    parts = (nothing,) * 3 if found is None else (found.class_token, found.mean_patch, found.patch)
    return Extracted(*(sharing.filled(each, rows, num_rows) for each in parts))
