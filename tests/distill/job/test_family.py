"""A family in stages: what each trains with, and that stopping, layouts and look-ahead change no bit."""

import os
from pathlib import Path

import pytest
import torch

from distill.errors import PlanError, RecipeError
from distill.job.family import _student_rates
from distill.job.resume import joining_steps
from distill.listing.document import builtin_recipes
from distill.plan.crop_sizes import crop_schedule
from distill.plan.from_recipe import family_footprint, later_plans, plan_family
from distill.plan.job import check_job
from distill.plan.teacher_source import teacher_shape
from distill.recipe.keys import FamilyRecipe, is_ours
from distill.recipe.reader import load_job
from distill.runfolder.manifest import FORMAT_VERSION, Manifest, NetworkFacts
from distill.train.by_step import PlanSchedule
from tests.support.jobs import (
    assert_equal_students,
    run_and_interrupt,
    run_distill,
    weights_of,
    write_recipes,
)

STAGES = (
    "stages=[{name: base, steps: 12}, "
    "{name: cooldown, steps: 12, lr: {peak: 1.0e-3, end: 0.0, decay: cosine}}, "
    "{name: high, steps: 12, batch: 8, ema: 0.99, lr: {peak: 2.0e-4, warmup: 4}, "
    "crops: [{global: 48, local: 16, ratio: 3}, {global: 64, local: 32, ratio: 1}]}]"
)
WHOLE = "engine.micro_batch=null"
# an initial LayerScale of 1e-5 has gradients of rounding, of which AdamW makes parts of a step
WORDS = (
    STAGES,
    "schedule.steps=36",
    "students.0.layerscale=0.5",
    "students.0.steps=27",
    "students.1.layerscale=0.5",
    "students.1.lr=5.0e-4",
)


def staged(*words: str) -> FamilyRecipe:
    """A large family in three stages."""
    recipe, _ = load_job("family_vit", [STAGES, "schedule.steps=36", *words])
    assert isinstance(recipe, FamilyRecipe)
    return recipe


def test_rates__of_a_stage_go_over_its_steps_and_the_others_over_all() -> None:
    recipe = staged("schedule.lr={peak: 1.0e-3, warmup: 2}", "students.0.lr=5.0e-4")
    base, cooldown, high = recipe.parts
    plain, half = recipe.students[1], recipe.students[0]
    rates = [_student_rates(recipe, stage, plain, 0) for stage in recipe.parts]
    assert [each.at(0).lr for each in rates[:1]] == [5e-4]  # the first of two steps of warm-up
    assert rates[0].at(11).lr == rates[1].at(12).lr == 1e-3
    assert rates[1].at(23).lr == 0.0
    assert rates[2].at(24).lr == pytest.approx(0.5e-4) and rates[2].at(35).lr == 2e-4
    assert {each.at(30).ema_momentum for each in rates[2:]} == {0.99}
    assert rates[0].at(20).ema_momentum == rates[1].at(20).ema_momentum > 0.994
    assert _student_rates(recipe, high, half, 0).at(35).lr == 1e-4  # half of the schedule's, too
    late = _student_rates(recipe, cooldown, plain, 18)  # joined in the middle of the cool-down
    assert late.at(18).lr == 1e-3 and late.at(23).lr == 0.0
    assert _student_rates(recipe, base, plain, 0).images_global == recipe.schedule.batch
    assert _student_rates(recipe, high, plain, 0).images_global == 8


def test_plan__of_every_stage_has_the_same_ranks_and_its_costs() -> None:
    recipe = staged("students.0.steps=27", "schedule.batch=2048", "stages.2.batch=1024", WHOLE)
    shape = teacher_shape(recipe, None, has_files=False)
    base, cooldown, high = plans = [
        plan_family(recipe, shape, 16, stage=stage) for stage in recipe.parts
    ]
    assert len({tuple(p.world_ranks for p in plan.placements) for plan in plans}) == 1
    assert (base.images_global, cooldown.images_global, high.images_global) == (2048, 2048, 1024)
    assert base.image_s == cooldown.image_s
    sizes = [crop_schedule(recipe, stage).specs for stage in recipe.parts]
    assert [len(each) for each in sizes] == [1, 1, 2]
    # 48 and 64 px in shares 3 and 1, against 256: the mean lies between those of each alone
    alone = []
    for crops in ("[{global: 48, local: 16}]", "[{global: 64, local: 32}]"):
        each = staged(f"stages.2.crops={crops}", "stages.2.batch=1024", WHOLE)
        alone.append(plan_family(each, shape, 16, stage=each.parts[2]).teach_s)
    assert high.teach_s == pytest.approx(0.75 * alone[0] + 0.25 * alone[1])
    footprints = [
        family_footprint(recipe, shape, plan, stage)
        for plan, stage in zip(plans, recipe.parts, strict=True)
    ]
    assert footprints[2].gathered_bytes < footprints[1].gathered_bytes
    jobs = check_job(recipe, None, 16, has_files=False)[-3:]
    assert [job.name for job in jobs] == ["family.base", "family.cooldown", "family.high"]
    assert all(is_ours(job.name) for job in jobs)
    assert [[step for step, _ in job.later] for job in jobs] == [[], [], [3]]
    in_force = PlanSchedule(high, later_plans(recipe, high))
    counts = [len(in_force.at(step).placements) for step in (26, 27)]
    assert counts == [len(recipe.students), len(recipe.students) - 1]


def test_plan__another_number_of_micro_batches_is_refused() -> None:
    recipe = staged("schedule.batch=2048", "stages.2.batch=1024", "engine.micro_batch=16")
    shape = teacher_shape(recipe, None, has_files=False)
    with pytest.raises(PlanError, match=r"micro-batches a step of .* in stage high, \d+ in base"):
        plan_family(recipe, shape, 8, stage=recipe.parts[2])


def test_joining_steps__are_counted_over_all_stages() -> None:
    recipe = staged()
    networks = {student.label: "hash" for student in recipe.students}
    first, *others = networks
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        number=1,
        phase="family.cooldown",
        step=5,
        num_ranks=2,
        is_milestone=False,
        recipe_hash="hash",
        networks={name: NetworkFacts(hash="hash", first_step=3) for name in others},
        files={},
    )
    steps = joining_steps(recipe, networks, (Path("family.cooldown-0000005"), manifest))
    assert steps == {first: 17, **dict.fromkeys(others, 3)}


BAD = {
    "schedule.steps=40": r"40: the stages have 12 \+ 12 \+ 12 steps - did you mean 36",
    "stages.1.name=base": "'base' is taken: stages need different names",
    "stages.2.crops.1.global=50": "50 is not a multiple of 16",
    "stages.1.gram={teacher: base@2}": "stages.1.gram.*unknown",
    "stages.1.objective={koleo: 0}": "stages.1.objective.*unknown",
    "stages.1.lr={peak: 1.0e-3, end: 0.0}": "0: not used, since decay is constant",
}


@pytest.mark.parametrize("word", BAD)
def test_load_job__a_stage_that_cannot_be(word: str) -> None:
    with pytest.raises(RecipeError, match=BAD[word]):
        staged(word)


def test_hash__is_as_before_without_stages() -> None:
    from distill.recipe.recipe_hash import recipe_hash

    recipe, _ = load_job(str(builtin_recipes()["family_vit"]), [])
    assert isinstance(recipe, FamilyRecipe)
    one = recipe.model_copy(update={"stages": recipe.parts})
    assert recipe_hash(recipe) != recipe_hash(one)
    assert recipe.phase_of(recipe.parts[0]) == "family"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family in three stages from a teacher in two; its recipe lies beside ``runs``."""
    folder = tmp_path_factory.mktemp("staged")
    write_recipes(folder, stage_steps=10, steps=36, save_every=1000)
    train(folder, "runs")
    return folder


def train(folder: Path, out: str, *words: str) -> Path:
    ended = run_distill("train", *job(folder, out), *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder / out / "tiny"


def job(folder: Path, out: str) -> list[str]:
    teacher = folder / "runs/tiny/teacher"
    source = [] if out == "runs" else [f"teacher={{weights: {teacher}}}"]
    return [str(folder / "family.yaml"), *WORDS, *source, "--out", str(folder / out)]


@pytest.mark.slow
def test_stop__in_every_stage_and_resume_equals_never_stopping(finished: Path) -> None:
    status = finished / "stopped/tiny/status.json"
    for name in ("base", "cooldown", "high"):
        run_and_interrupt(["train", *job(finished, "stopped")], status, f"family.{name}")
    assert_equal_students(train(finished, "stopped"), finished / "runs/tiny")


@pytest.mark.slow
def test_train__look_ahead_changes_no_bit_over_stages(finished: Path) -> None:
    ahead = train(finished, "ahead", "engine.lookahead=0")
    assert_equal_students(ahead, finished / "runs/tiny")


@pytest.mark.slow
def test_train__one_rank_equals_two_over_stages(finished: Path) -> None:
    """ConvNeXt trains on both of two ranks, the others on one each: sums in another order, measured 6e-8."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(
        0, {min(cores)}
    )  # two threads of a rank wait long for each other on a busy machine
    try:
        ours = weights_of(train(finished, "alone", "engine.processes=1"))
    finally:
        os.sched_setaffinity(0, cores)
    theirs = weights_of(finished / "runs/tiny")
    assert ours.keys() == theirs.keys() == {"plain", "gated", "conv"}
    for name, weights in theirs.items():
        for key, tensor in weights.items():
            torch.testing.assert_close(ours[name][key], tensor, rtol=0, atol=1e-6)
