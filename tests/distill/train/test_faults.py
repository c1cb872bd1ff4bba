"""What becomes of a student whose fault lasts, and of one that raises; single faults are in ``tests.chaos.nan``."""

from pathlib import Path

import pytest
import torch

from distill.runfolder.parked import Parked, read_parked
from distill.train.faults import IN_A_ROW, ROLL_BACKS
from tests.chaos.nan import NUM_STEPS, Fault, Outcome, train_all
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
