from hypothesis import given, settings
from hypothesis import strategies as st

from distill.plan.from_recipe import plan_family
from distill.plan.placement import NetworkCost
from distill.plan.plan import make_plan
from distill.plan.shares import split_evenly
from distill.plan.slices import Placement
from distill.plan.teacher_source import teacher_shape
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job


def test_parts_of__whole_koleo_groups_and_as_many_on_every_rank() -> None:
    (placement,) = make_plan([NetworkCost("a", 1.0)], 1.0, 16 * 2 * 5, 2).placements
    assert placement.parts_of(1) == (slice(0, 80),)
    assert placement.parts_of(1, 32) == (slice(0, 16), slice(16, 48), slice(48, 80))


@settings(max_examples=50, deadline=None)
@given(
    images=st.integers(1, 300),
    num_ranks=st.integers(1, 5),
    num_parts=st.integers(1, 40),
    in_groups=st.booleans(),
)
def test_parts_of__cover_the_slice_and_the_largest_is_known(
    images: int, num_ranks: int, num_parts: int, in_groups: bool
) -> None:
    slices = split_evenly(images, min(images, num_ranks), in_groups=in_groups)
    placement = Placement("a", 3, tuple(slices), num_parts)
    for rank in placement.world_ranks:
        parts = placement.parts_of(rank)
        assert len(parts) == num_parts
        assert [i for p in parts for i in range(p.start, p.stop)] == [
            *range(len(placement.slice_of(rank)))
        ]
        assert placement.images_at_once(rank) == max(p.stop - p.start for p in parts)
    assert placement.most_at_once == max(map(placement.images_at_once, placement.world_ranks))


def test_koleo_groups__of_the_released_family_are_the_images_of_a_gpu() -> None:
    recipe, _ = load_job("family_released")
    assert isinstance(recipe, FamilyRecipe)
    plan = plan_family(recipe, teacher_shape(recipe, None, has_files=False), 296)
    sizes = [student.koleo_group or recipe.schedule.koleo_group for student in recipe.students]
    assert sizes == [40, 40, 24, 16]
    for size, placement in zip(sizes, plan.placements, strict=True):
        assert {len(each) for each in placement.slices} == {size}
        assert placement.koleo_is_local(size) and not placement.koleo_is_local(size + 1)
