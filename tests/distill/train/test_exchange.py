"""A network's part of a delivery; the exchange itself is tested on real groups in test_ranks.py."""

import pytest

from distill.plan.slices import Placement
from teacher.batch import Delivery, PatchMasks, student_batch
from tests.support.tiny import crops, masks, teacher

PLACEMENT = Placement("small", 1, (range(2), range(2, 4)))  # on ranks 1 and 2


def delivery(*positions: range) -> Delivery:
    count = sum(map(len, positions))
    own, mask = crops(count), PatchMasks.of(masks(count))
    return Delivery(own, teacher().teach(own, mask), mask, positions)


def test_student_batch__is_the_ranks_slice() -> None:
    batch = student_batch(delivery(range(2), range(2, 4)), PLACEMENT.slice_of(2), (2, 2), 4)
    assert batch.start == 2 and batch.crops.global_crops.shape[1] == 2


@pytest.mark.parametrize("rank", [0, 3])
def test_student_batch__of_a_rank_that_is_not_of_the_placement(rank: int) -> None:
    with pytest.raises(
        AssertionError, match=rf"small trains on ranks \[1, 2\], not on rank {rank}"
    ):
        student_batch(delivery(range(4)), PLACEMENT.slice_of(rank), (2, 2), 4)


def test_student_batch__of_positions_that_were_not_delivered() -> None:
    with pytest.raises(AssertionError, match="positions 2 to 4 were not delivered"):
        student_batch(delivery(range(2)), PLACEMENT.slice_of(2), (2, 2), 4)
