"""What becomes of a student whose fault lasts, and of one that raises; single faults are in ``tests.chaos.nan``."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.engine.engine import prepare_deepspeed
from distill.plan.placement import NetworkCost
from distill.plan.plan import PlanOptions, make_plan
from distill.runfolder.events import read_events
from distill.runfolder.parked import Parked, read_parked
from distill.train.faults import IN_A_ROW, ROLL_BACKS, FaultHandler
from distill.train.groups import make_groups
from tests.chaos.nan import NUM_STEPS, Fault, Outcome, train_all
from tests.support.families import IMAGES, Ways, family_phase
from tests.support.spawn import on_ranks

NAN = float("nan")
LASTING = Fault("loss", "b", 0, 1, NAN, until=NUM_STEPS)
RAISES = Fault("exception", "b", 0, 6, NAN, has_heads=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fault_handler")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[Outcome]:
    """Without a fault, with heads and without; then a loss that stays bad, then an exception."""
    return on_ranks(1, train_all, [LASTING, RAISES], str(folder))[0]  # type: ignore[no-any-return]


def assert_others_equal(one: Outcome, other: Outcome) -> None:
    for name in "ac":
        assert one.skipped[name] == 0 and not one.parked[name]
        for key, tensor in other.states[name].items():
            assert torch.equal(one.states[name][key], tensor), (name, key)


def test_learn__a_lasting_fault_is_skipped_rolled_back_and_parked(
    outcomes: list[Outcome], folder: Path
) -> None:
    calm, _, lasting, _ = outcomes
    assert lasting.skipped["b"] == IN_A_ROW * ROLL_BACKS
    assert lasting.rolled_back["b"] == ROLL_BACKS and lasting.parked["b"]
    kinds = [text.split(" ")[1] for text in lasting.told]
    each = ["step"] * IN_A_ROW + ["rolled"]
    assert kinds == each * ROLL_BACKS + ["parked"]
    assert lasting.told[3] == "b: rolled back to step 0: 3 skipped steps in a row"
    reason = "rolled back 3 times to the same state"
    step = 1 + IN_A_ROW * ROLL_BACKS - 1
    assert read_parked(folder / "2", "b") == Parked(step, reason)
    assert read_parked(folder / "2", "a") is None
    assert int(lasting.states["b"]["step"]) == 0 and int(lasting.states["a"]["step"]) == NUM_STEPS
    assert_others_equal(lasting, calm)


def test_learn__an_exception_parks_that_student_alone(
    outcomes: list[Outcome], folder: Path
) -> None:
    _, calm, _, raises = outcomes
    assert raises.parked["b"] and raises.skipped["b"] == 0
    (told,) = raises.told
    assert told.startswith("b: parked with its state of step 4: ValueError: a network of another")
    assert int(raises.states["b"]["step"]) == 4
    assert all(tensor.isfinite().all() for tensor in raises.states["b"].values())
    assert_others_equal(raises, calm)


def test_learn__in_a_larger_group_the_attempt_ends_and_the_student_is_parked(
    tmp_path: Path,
) -> None:
    with pytest.raises(AssertionError, match="StudentError: a is parked from now on"):
        on_ranks(3, train_all, [Fault("exception", "a", 0, 2, NAN)], str(tmp_path))
    parked = read_parked(tmp_path / "2", "a")
    assert parked is not None and parked.step == 2 and "another shape" in parked.reason


def save_what_one_rank_trains(folder: str) -> list[str]:
    """Saves of a network on one rank, finite or not; the texts of the run's events."""
    prepare_deepspeed("cpu")
    plan = make_plan([NetworkCost("a", 3.0)], 1.0, IMAGES, 1, PlanOptions())
    groups = make_groups(plan, timedelta(seconds=60))
    phase = family_phase(plan, groups, NUM_STEPS, Ways())
    (trainer,) = phase.trainers
    handler = FaultHandler(phase, Path(folder))
    shards = trainer.engine._local_shards()
    record = handler._records["a"]

    def is_now(state: dict[str, Tensor]) -> bool:
        live = trainer.state()
        return live.keys() == state.keys() and all(torch.equal(live[k], state[k]) for k in live)

    def moved_and_saved(kind: str, change: float, step: int) -> dict[str, Tensor]:
        shards[0][kind].detach().add_(change)
        (held,) = handler.before_save(step).values()
        return held

    assert is_now(handler.start(0, groups.control)["a"])
    good = moved_and_saved("weight", 1.0, 1)
    assert is_now(good)
    bits = {name: each.clone() for name, each in good.items()}
    for step, kind in enumerate(("ema", "exp_avg", "weight"), start=2):
        record.has_moved = True
        assert moved_and_saved(kind, NAN, step) is good and is_now(bits)
        record.num_roll_backs = 0
    record.in_a_row = 1  # what is saved is not what is gone back to
    skipping = moved_and_saved("weight", 1.0, 5)
    assert skipping is not good and is_now(skipping) and not is_now(bits)
    assert moved_and_saved("exp_avg_sq", NAN, 6) is good and is_now(bits)
    newer = moved_and_saved("weight", 1.0, 7)
    assert is_now(newer) and newer["step"] is skipping["step"], "memory without a good state"
    assert moved_and_saved("weight", 1.0, 8)["step"] is good["step"], "and then the other"
    return [event.text for event in read_events(Path(folder))]


def test_before_save__of_one_rank_holds_one_copy_for_the_save_and_to_go_back_to(
    tmp_path: Path,
) -> None:
    (texts,) = on_ranks(1, save_what_one_rank_trains, str(tmp_path))
    assert texts == ["a: rolled back to step 1: its state is not finite"] * 4
