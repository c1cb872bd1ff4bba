"""The formula, with the counts and the results of the table that its rates were chosen for."""

import pytest

from distill.bench.roofline import HARDWARE, HOOK_S, LAUNCH_S, RATES, Work, estimate, find_hardware
from distill.errors import PlanError

SINKHORN_MB = 2004.0
# Of family_vit at 16 images at once: width, launches, TF, other MB, trained tensors; ms and MFU in percent
STUDENTS = {
    "vits16": (384, 6566, 0.182, 3856.0, 225, 3.6, 5.0),
    "vits16plus": (384, 6782, 0.223, 4236.0, 249, 3.8, 5.8),
    "vitb16": (768, 6566, 0.559, 5680.0, 225, 3.7, 15.0),
    "vitl16": (1024, 8906, 1.848, 11740.0, 429, 7.8, 24.0),
    "vith16plus": (1280, 11042, 4.959, 21673.0, 629, 15.8, 32.0),
}


def work_of(name: str) -> Work:
    width, launches, tflop, other_mb, tensors, *_ = STUDENTS[name]
    return Work(width, 16, launches, tflop, other_mb, tensors, SINKHORN_MB)


@pytest.mark.parametrize("name", STUDENTS)
def test_estimate__gives_every_cell_of_the_table(name: str) -> None:
    found = estimate(work_of(name), HARDWARE["h100"])
    assert found.ms == pytest.approx(STUDENTS[name][5], rel=0.03)
    assert 100 * found.mfu == pytest.approx(STUDENTS[name][6], rel=0.03)


def test_estimate__of_the_teacher_at_two_images_and_at_sixteen() -> None:
    """13.1 ms of products, of which the tiles of 1,044 rows leave 27% empty, and 5.1 of other kernels; 10.0 at 16 images."""
    two = Work(4096, 2, 1348, 7.11, 14261.0, fill=0.733)
    found = estimate(two, HARDWARE["h100"])
    assert found.matmul_ms == pytest.approx(13.1, rel=0.03)
    assert found.other_ms == pytest.approx(5.1, rel=0.03)
    assert found.ms == pytest.approx(18.2, rel=0.03)
    assert 100 * found.mfu == pytest.approx(39.0, rel=0.03)
    sixteen = estimate(Work(4096, 16, 1400, 7.11, 14261.0, fill=0.96), HARDWARE["h100"])
    assert sixteen.matmul_ms == pytest.approx(10.0, rel=0.03)


def test_estimate__names_what_takes_longest() -> None:
    bounds = {name: estimate(work_of(name), HARDWARE["h100"]).bound for name in STUDENTS}
    assert bounds["vits16"] == "host" and bounds["vith16plus"] == "memory"
    assert estimate(Work(4096, 16, 0, 7.0, 100.0), HARDWARE["h100"]).bound == "matmul"


def test_rates__are_not_changed() -> None:
    """Figures of two commits are compared by them, so a changed rate makes all tables wrong."""
    assert RATES == {384: 450.0, 768: 600.0, 1024: 650.0, 1280: 680.0, 4096: 740.0}
    assert (LAUNCH_S, HOOK_S) == (6e-6, 80e-6)
    h100 = HARDWARE["h100"]
    assert (h100.peak_tflops, h100.other_tb_s) == (989.0, 2.8)
    assert h100.rate(576) == 525.0 and h100.rate(64) == 450.0 and h100.rate(8192) == 740.0
    assert HARDWARE["a100"].rate(768) == pytest.approx(600.0 * 312 / 989)


def test_find_hardware__names_the_known_ones() -> None:
    with pytest.raises(PlanError, match="--device tpu: no rates are known") as raised:
        find_hardware("tpu")
    assert raised.value.fix == "Choose one of h100, h200, a100."
