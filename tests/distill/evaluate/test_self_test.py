from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data.maps import decode_depth
from distill.evaluate import dense_self_test, scoring, self_test
from distill.evaluate.self_test import Check
from distill.protocols.tasks import TASKS
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
    for kind in ("class tokens", "patch features"):
        assert f"variance of {kind} without the final norm" in wrong
    assert {f"{name} (quick)" for name in dense_self_test.RIGHT} <= right
    assert {f"{name} (quick), maps and points shuffled" for name in dense_self_test.RIGHT} <= wrong
    assert "seg mIoU (quick), masks reduced by nearest" in wrong


def test_right__of_dense_tasks_is_that_of_the_made_up_maps(tmp_path: Path) -> None:
    """The figures, pixel by pixel, of a prediction that knows the colours and nothing else."""
    data = dense_self_test.write_dense(tmp_path)
    both, union, squares, relative = [0, 0], [0, 0], [], []
    for path in sorted((data / "images" / "val").iterdir()):
        with Image.open(path) as picture, Image.open(data / "masks" / "val" / path.name) as mask:
            found, right = np.asarray(picture)[..., 0] > 128, np.asarray(mask)
        for label in (0, 1):
            is_found, is_right = (found == label) & (right != 255), right == label
            both[label] += int((is_found & is_right).sum())
            union[label] += int((is_found | is_right).sum())
        depth = decode_depth(
            np.fromfile(next((data / "depth" / "val").glob(f"{path.stem}.*")), np.uint8), 0.001
        )
        error = np.where(found, 4.0, 2.0) - depth
        squares += (error[depth > 0] ** 2).tolist()
        relative += (np.abs(error)[depth > 0] / depth[depth > 0]).tolist()
    known = dense_self_test.RIGHT
    assert known["seg mIoU"] == pytest.approx(
        sum(b / u for b, u in zip(both, union, strict=True)) / 2
    )
    assert known["depth RMSE"] == pytest.approx(np.mean(squares) ** 0.5, rel=1e-4)
    assert known["depth AbsRel"] == pytest.approx(np.mean(relative), rel=1e-4)


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
    monkeypatch.setattr(self_test, "dense_checks", lambda *_: [])
    ended = distill("eval", "--self-test", "--tasks", "knn")
    assert ended.code == 1 and "FAIL  knn (quick): " in ended.out, ended.err
