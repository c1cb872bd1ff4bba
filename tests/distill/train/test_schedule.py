import math

import pytest

from distill.recipe.schedules import LrSpec, ScheduleSpec, TemperatureSpec
from distill.train.schedule import cosine, learning_rate, rope_scales, teacher_temperature


def test_learning_rate__warms_up_then_stays() -> None:
    lr = LrSpec(peak=1.0, warmup=4)
    assert [learning_rate(lr, step, 100, 1024) for step in range(6)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        1.0,
    ]


def test_learning_rate__cosine_ends_at_the_end() -> None:
    lr = LrSpec(peak=1.0, end=0.1, warmup=10, decay="cosine")
    values = [learning_rate(lr, step, 111, 1024) for step in range(111)]
    assert (
        values[10] == 1.0
        and values[60] == pytest.approx(0.55)
        and values[110] == pytest.approx(0.1)
    )
    assert values[10:] == sorted(values[10:], reverse=True)


def test_learning_rate__square_root_rule() -> None:
    lr = LrSpec(peak=1e-4, scale="sqrt_1024")
    assert learning_rate(lr, 0, 10, 4096) == pytest.approx(1e-4 * 4 * math.sqrt(4))


def test_teacher_temperature__linear_over_the_warm_up() -> None:
    schedule = ScheduleSpec(
        batch=1,
        lr=LrSpec(peak=1.0),
        teacher_temperature=TemperatureSpec(start=0.04, end=0.07, warmup=10),
    )
    assert teacher_temperature(schedule, 0) == 0.04
    assert teacher_temperature(schedule, 5) == pytest.approx(0.055)
    assert teacher_temperature(schedule, 10) == teacher_temperature(schedule, 99) == 0.07


def test_cosine__leads_to_its_end() -> None:
    assert cosine(0.99, 1.0, 0, 100) == pytest.approx(0.99)
    assert cosine(0.99, 1.0, 100, 100) == pytest.approx(1.0)
    assert cosine(0.04, 0.4, 50, 100) == pytest.approx(0.22)
    assert cosine(0.04, None, 50, 100) == 0.04


def test_learning_rate__rises_along_half_a_cosine() -> None:
    lr = LrSpec(peak=1.0, warmup=4, ramp="cosine")
    rates = [learning_rate(lr, step, 10, 1024) for step in range(5)]
    assert rates == pytest.approx([0.1464466, 0.5, 0.8535534, 1.0, 1.0])


def test_rope_scales__are_log_uniform_and_the_same_everywhere() -> None:
    draws = [scale for step in range(500) for scale in rope_scales((0.5, 2.0), 3, step)]
    assert min(draws) >= 0.5 and max(draws) <= 2.0
    assert abs(sum(map(math.log, draws)) / len(draws)) < 0.05  # standard error 0.013
    assert (
        rope_scales((0.5, 2.0), 3, 7)
        == rope_scales((0.5, 2.0), 3, 7)
        != rope_scales((0.5, 2.0), 4, 7)
    )
    assert rope_scales(None, 3, 7) == (1.0, 1.0)
