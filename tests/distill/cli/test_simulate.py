"""``distill plan --simulate`` as people call it."""

import json

import pytest

from tests.support.command import Run

FAMILY = ("plan", "family_vit", "--ranks", "8", "--device", "h100")


def test_simulate__figures_of_every_mode_and_life(distill: Run) -> None:
    words = ("--simulate", "--jitter", "0%", "--mtbf", "10h/8", "--days", "3", "--seed", "4")
    ended = distill(*FAMILY, *words, "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    modes, lives = report["modes"], report["lives"]
    assert modes["published"]["utilisation"] == pytest.approx(0.7314, abs=1e-3)
    assert modes["ours"]["utilisation"] > 0.98
    assert [(each["mode"], each["saving"]) for each in lives] == [
        ("ours", "in memory"),
        ("ours", "on disk"),
        ("published", "on disk"),
    ]
    assert report["mtbf_h"] == pytest.approx(10.0) and report["device"] == "h100"
    for life in lives:
        parts = [life[name] for name in ("goodput", "stalled", "lost", "down")]
        assert sum(parts) == pytest.approx(1.0) and 0 < life["goodput"] < 1
        assert life["gpu_hours_lost"] == pytest.approx(8 * 72 * (1 - life["goodput"]))
    assert report["faster_than_separate"] == pytest.approx(2.92, abs=0.03)


def test_simulate__tables_and_assumptions(distill: Run) -> None:
    ended = distill(*FAMILY, "--simulate", "--assume", "restart=0", "--assume", "copy=50")
    assert ended.code == 0, ended.err
    for text in ("goodput", "published", "in memory", "on disk", "GPU hours"):
        assert text in ended.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--simulate", "--jitter", "2"), "--jitter 2: not a percentage from 0% to 100%"),
        (("--simulate", "--jitter", "101%"), "--jitter 101%: not a percentage"),
        (("--simulate", "--mtbf", "7.9h"), "--mtbf 7.9h: not TIME/GPUS"),
        (("--simulate", "--mtbf", "0h/1024"), "--mtbf 0h/1024: not TIME/GPUS"),
        (("--simulate", "--days", "0"), "--days 0: not above 0"),
        (("--simulate", "--days=-1"), "--days -1: not above 0"),
        (("--simulate", "--days", "nan"), "--days nan: not above 0"),
        (("--simulate", "--assume", "luck=1"), "--assume luck=1: not NAME=NUMBER"),
        (("--simulate", "--assume", "copy=0"), "--assume copy=0: not NAME=NUMBER"),
        (("--mtbf", "7.9h/1024"), "are for --simulate"),
    ],
)
def test_simulate__one_line_for_what_cannot_be(
    distill: Run, words: tuple[str, ...], message: str
) -> None:
    ended = distill(*FAMILY, *words)
    assert ended.code == 2 and message in ended.err
    assert len(ended.err.strip().splitlines()) == 2 and "Fix: " in ended.err


def test_simulate__a_teacher_has_no_students(distill: Run) -> None:
    ended = distill("plan", "teacher_vitl_in1k", "--ranks", "8", "--device", "h100", "--simulate")
    assert ended.code == 2 and "has no students" in ended.err
