from pathlib import Path

import pytest

from distill.errors import CheckpointError
from distill.job.resume import describe_resume, find_saved, joining_steps
from distill.listing.document import builtin_recipes
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_recipe
from distill.recipe.recipe_hash import recipe_hash
from distill.runfolder.manifest import FORMAT_VERSION, ChangedError, Manifest, NetworkFacts

LOADED = load_recipe(builtin_recipes()["family_vit"])
assert isinstance(LOADED, FamilyRecipe)
RECIPE = LOADED
NETWORKS = {student.label: recipe_hash(student) for student in RECIPE.students}
FIRST, *_, LAST = NETWORKS


def found(networks: dict[str, NetworkFacts], phase: str = "family") -> tuple[Path, Manifest]:
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        number=1,
        phase=phase,
        step=40,
        num_ranks=2,
        is_milestone=False,
        recipe_hash="hash",
        networks=networks,
        files={},
    )
    return Path("checkpoints/family-0000040"), manifest


def saved(first_step: int = 0) -> dict[str, NetworkFacts]:
    return {n: NetworkFacts(hash=h, first_step=first_step) for n, h in NETWORKS.items()}


def test_joining_steps__are_the_checkpoints_word_or_its_own_step() -> None:
    assert set(joining_steps(RECIPE, NETWORKS, None).values()) == {0}
    assert set(joining_steps(RECIPE, NETWORKS, found(saved(), "heads")).values()) == {0}
    held = saved(7)
    del held[LAST]
    steps = joining_steps(RECIPE, NETWORKS, found(held))
    assert steps == {name: 40 if name == LAST else 7 for name in NETWORKS}


def test_joining_steps__refuses_a_student_that_changed() -> None:
    held = {**saved(), FIRST: NetworkFacts(hash="another", first_step=0)}
    told = (
        rf"students\.{FIRST}: its lines in the recipe are not those of checkpoints/family-0000040"
    )
    with pytest.raises(CheckpointError, match=told):
        joining_steps(RECIPE, NETWORKS, found(held))


def test_joining_steps__refuses_a_student_that_would_join_after_its_end() -> None:
    early = RECIPE.students[0].model_copy(update={"steps": 30})
    recipe = RECIPE.model_copy(update={"students": (early, *RECIPE.students[1:])})
    held = saved()
    del held[FIRST]
    told = rf"students\.{FIRST}\.steps = 30: the family has finished step 40 already"
    with pytest.raises(CheckpointError, match=told):
        joining_steps(recipe, NETWORKS, found(held))


def test_describe_resume__names_the_checkpoint_and_who_joined_or_left() -> None:
    held = {**saved(), "gone": NetworkFacts(hash="x", first_step=0)}
    del held[LAST]
    assert describe_resume(NETWORKS, found(held)) == [
        "resumes from family-0000040 (family step 40)",
        f"{LAST}: new, starts at step 40 with fresh weights",
        "gone: no longer in the recipe, left at step 40",
    ]
    assert describe_resume(NETWORKS, None) == []
    (line,) = describe_resume(NETWORKS, found(held, "heads"))
    assert line.endswith("(heads step 40)")


def test_find_saved__where_all_is_damaged_copies_in_memory_may_be_left(tmp_path: Path) -> None:
    assert find_saved(tmp_path, "hash", has_copies=False) is None
    path = tmp_path / "family-0000040"
    path.mkdir()
    (path / "manifest.json").write_text(found(saved())[1].to_text())
    with pytest.raises(ChangedError):
        find_saved(tmp_path, "another", has_copies=True)
    (path / "manifest.json").write_text("damaged")
    assert find_saved(tmp_path, "hash", has_copies=True) is None
    with pytest.raises(CheckpointError, match="every checkpoint in it is damaged"):
        find_saved(tmp_path, "hash", has_copies=False)
