"""One evaluation on several ranks: each decodes and embeds its part of the images, and all get all rows.

    rank r    decodes images r, r + n, ...   embeds batches r, r + n, ...   (n ranks)
    then      the parts are added up: each rank has zeros where others have values

Batches are those of one process, so that features have the same bits on any number of ranks.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
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
        """The values of all ranks by rank, which JSON can hold. Collective: two all-reduces."""
        if self.num_ranks == 1:
            return [value]
        data = np.frombuffer(json.dumps(value).encode(), np.uint8).copy()
        sizes = torch.zeros(self.num_ranks, dtype=torch.int64)
        sizes[self.rank] = len(data)
        dist.all_reduce(sizes)
        texts = torch.zeros(self.num_ranks, int(sizes.max()), dtype=torch.uint8)
        texts[self.rank, : len(data)] = torch.from_numpy(data)
        dist.all_reduce(texts)
        pairs = zip(texts, sizes.tolist(), strict=True)
        return [json.loads(text[:size].numpy().tobytes()) for text, size in pairs]

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
    reasons = {each.sample: each.reason for each in read.left_out}
    found = [image for image in local if str(split.locations[image]) not in reasons]
    named = [(i, str(split.locations[i])) for i in local if str(split.locations[i]) in reasons]
    gathered = sharing.gathered((found, [(i, name, reasons[name]) for i, name in named]))
    good = sorted(image for images, _ in gathered for image in images)
    rows = torch.searchsorted(torch.tensor(good), torch.tensor(found, dtype=torch.int64))
    pixels, *more = (
        sharing.filled(each, rows, len(good)) for each in (read.pixels, *read.others.values())
    )
    left_out = sorted((i, name, reason) for _, bad in gathered for i, name, reason in bad)
    decoded = Scored([split.locations[image] for image in good], split.labels[good])
    others_read = dict(zip(read.others, more, strict=True))
    named_out = tuple(LeftOut(name, reason) for _, name, reason in left_out)
    return ReadSplit(decoded, pixels, named_out, others_read)


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
