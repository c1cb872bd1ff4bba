"""Where one network trains: ranks, slices of the batch, and micro-batches of a slice."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from teacher.shapes import KOLEO_GROUP


@dataclass(frozen=True)
class Placement:
    """Where one network trains: contiguous ranks, each with its slice of the global batch.

    ``num_parts``: micro-batches a step, as many on every rank.
    """

    name: str
    first_rank: int
    slices: tuple[range, ...]
    num_parts: int = 1

    @property
    def world_ranks(self) -> range:
        """The world ranks that train this network."""
        return range(self.first_rank, self.first_rank + len(self.slices))

    def slice_of(self, world_rank: int) -> range:
        """The positions that one of its ranks trains on."""
        assert world_rank in self.world_ranks, (
            f"{self.name} trains on ranks {[*self.world_ranks]}, not on rank {world_rank}"
        )
        return self.slices[world_rank - self.first_rank]

    def parts_of(self, world_rank: int, limit: int | None = None) -> tuple[slice, ...]:
        """A rank's slice cut into its micro-batches, by numbers within the slice.

        ``limit``: images that a micro-batch may have after memory ran out; then there are as many as the largest slice
        needs. Full KoLeo groups where the slice is, unless there are more micro-batches than groups.
        """
        count = max(self.num_parts, 1 if limit is None else -(-self.largest_slice // limit))
        local, unit = self.slice_of(world_rank), self._unit(world_rank, count)
        borders = [unit * (len(local) // unit * part // count) for part in range(count + 1)]
        return tuple(slice(start, stop) for start, stop in pairwise(borders))

    def _unit(self, world_rank: int, count: int) -> int:
        """Images that ``count`` micro-batches of a rank's slice are multiples of."""
        local = self.slice_of(world_rank)
        in_groups = local.start % KOLEO_GROUP == 0 == len(local) % KOLEO_GROUP
        is_small = count > -(-self.largest_slice // KOLEO_GROUP)
        return KOLEO_GROUP if in_groups and not is_small else 1

    @cached_property
    def largest_slice(self) -> int:
        """Images of the rank that trains on most."""
        return max(map(len, self.slices))

    def images_at_once(self, world_rank: int) -> int:
        """Images of the largest micro-batch of one of its ranks."""
        unit = self._unit(world_rank, self.num_parts)
        return unit * -(-len(self.slice_of(world_rank)) // unit // self.num_parts)

    @property
    def most_at_once(self) -> int:
        """Images of the largest micro-batch of all its ranks."""
        return max(map(self.images_at_once, self.world_ranks))

    def koleo_is_local(self, group_images: int) -> bool:
        """No KoLeo group of so many images is cut by a slice border."""
        return all(part.start % group_images == 0 for part in self.slices)
