import pytest

from distill.evaluate import scoring, self_test
from distill.evaluate.self_test import Check
from distill.evaluate.tasks import TASKS
from tests.support.command import Run


@pytest.fixture(scope="module")
def checks() -> list[Check]:
    return self_test.self_test(lambda _: None)


def test_self_test__every_task_is_right_and_every_wrong_setup_is_caught(
    checks: list[Check],
) -> None:
    assert all(check.is_ok for check in checks), [check.line for check in checks]
    right = {check.name for check in checks if not check.is_wrong_setup}
    wrong = {check.name for check in checks if check.is_wrong_setup}
    assert {f"{task} (quick)" for task in TASKS} <= right
    assert {f"{task} (quick), training labels shuffled" for task in TASKS} <= wrong
    assert "variance of class tokens without the final norm" in wrong


def test_right_score__of_retrieval_is_that_of_the_definition() -> None:
    """Two classes of 40; 4 of 20 held-out images find theirs after the 40 others."""
    ranks = range(1, 41)
    last = sum(i / (40 + i) for i in ranks) / 40
    assert self_test.right_score("retrieval") == pytest.approx(0.8 * 1 + 0.2 * last)


def test_check__prints_what_is_expected() -> None:
    good = Check("knn (quick)", 0.8, 0.8, is_ok=True)
    assert good.line == "ok    knn (quick): 0.8000, expected 0.8000"
    missed = Check("knn (quick), shuffled", 0.8, 0.8, is_ok=False, is_wrong_setup=True)
    assert missed.line.startswith("FAIL  knn") and missed.line.endswith("caught: right is 0.8000")


def test_eval_self_test__ends_with_1_where_a_check_fails(
    distill: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out labels that were moved on by one image, as a mix-up of orders would."""
    original = scoring.Sample

    def moved(*given: object) -> object:
        train, labels, test, wanted, protocol = given
        return original(train, labels, test, wanted.roll(5), protocol)  # type: ignore[arg-type, attr-defined]

    monkeypatch.setattr(scoring, "Sample", moved)
    monkeypatch.setattr(self_test, "TASKS", {"knn": TASKS["knn"]})
    ended = distill("eval", "--self-test", "--tasks", "knn")
    assert ended.code == 1 and "FAIL  knn (quick): " in ended.out, ended.err
