"""What a step needs, of a family whose networks are small; the full one is marked slow."""

import json
from typing import Any

import pytest

from distill.bench.meta_work import FamilyWork, trace_student, trace_teacher
from distill.plan.costs import costs_of
from distill.plan.from_recipe import Recipe
from distill.plan.teacher_source import teacher_shape
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job

KEYS = {"launches", "tflop", "matmul_mb", "other_mb", "ms", "mfu"}
# As in tests/distill/bench/test_roofline.py: launches, TF, other MB, ms, MFU in percent
TABLE = {
    "vits16": (6566, 0.182, 3856, 3.6, 5.0),
    "vits16plus": (6782, 0.223, 4236, 3.8, 5.8),
    "vitb16": (6566, 0.559, 5680, 3.7, 15),
    "vitl16": (8906, 1.848, 11740, 7.8, 24),
    "vith16plus": (11042, 4.959, 21673, 15.8, 32),
    "teacher": (1348, 7.11, 14261, 18.2, 39),
}


def report_of(distill: Any, *words: object) -> dict[str, Any]:
    ended = distill("bench", "step", *words, "--json")
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


def family(*overrides: str) -> FamilyWork:
    loaded: tuple[Recipe, Any] = load_job("recipes/bench_cpu.yaml", overrides)
    assert isinstance(loaded[0], FamilyRecipe)
    return FamilyWork(loaded[0], teacher_shape(*loaded, has_files=False))


def test_bench_step__lists_what_every_network_needs(distill: Any) -> None:
    report = report_of(distill, "bench_cpu", "--ranks", "2")
    assert set(report["networks"]) == {"wide", "narrow", "convnext"}
    rows = [report["teacher"], *report["networks"].values()]
    assert all(set(row) >= KEYS for row in rows)
    assert report["ms_per_image"] == pytest.approx(sum(row["ms"] for row in rows))
    costs = costs_of(report, "a test")
    assert costs is not None and costs.teach_s == report["teacher"]["ms"] / 1e3
    assert {name: s * 1e3 for name, s in costs.image_s.items()} == pytest.approx(
        {name: row["ms"] for name, row in report["networks"].items()}
    )
    assert report["step"]["ranks"] == 2 and report["step"]["batch"] == 32
    assert report["step"]["ms"] >= report["step"]["ms_in_balance"]
    assert any("TB/s" in each for each in report["assumptions"])
    for row in report["networks"].values():
        of_phases = [row["phases"][name] for name in ("forward", "loss", "backward")]
        assert sum(each["launches"] for each in of_phases) == row["launches"]
        assert sum(each["other_mb"] for each in of_phases) == pytest.approx(row["other_mb"])
        assert row["phases"]["optimizer"]["launches"] > 0


def test_family_work__a_teacher_that_sees_half_has_half_the_grid() -> None:
    half = family("teacher.crop_scale=0.5", *(f"students.{i}.crop_scale=0.5" for i in range(3)))
    full = family()
    assert half.grid_hw == tuple(side // 2 for side in full.grid_hw)
    assert (
        trace_teacher(half).phases["forward"].flops
        < 0.3 * trace_teacher(full).phases["forward"].flops
    )


@pytest.mark.slow
def test_bench_step__prints_tables_and_what_they_rest_on(distill: Any) -> None:
    ended = distill("bench", "step", "bench_cpu", "--ranks", "2")
    assert ended.code == 0
    assert "images at once" in ended.out and "perfect balance; the plan has" in ended.out
    assert "nothing ran on a GPU" in ended.out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("bench_cpu", "--device", "tpu"), "--device tpu: no rates are known"),
        (("teacher_7b",), "teacher_7b: not a family recipe"),
        (("bench_cpu", "--ranks", "64"), "leaves ranks without an image"),
        (("nowhere.yaml",), "no such recipe file"),
    ],
)
def test_bench_step__bad_input_is_one_line(distill: Any, words: tuple[str, ...], text: str) -> None:
    ended = distill("bench", "step", *words)
    assert ended.code != 0 and text in ended.err and not ended.out
    assert len(ended.err.strip().splitlines()) == 2  # the line and its fix


def test_trace_student__twice_the_images_are_twice_the_work_in_as_many_launches() -> None:
    small = family()
    student = small.recipe.students[0]
    one, two = (trace_student(small, student, images, 1) for images in (16, 32))
    ratio = two.phases["forward"].flops / one.phases["forward"].flops
    assert ratio == pytest.approx(2.0, rel=1e-3)
    assert one.phases["forward"].launches == two.phases["forward"].launches
    assert one.phases["optimizer"] == two.phases["optimizer"]


def test_trace_student__the_backward_pass_is_twice_the_forward_pass() -> None:
    """But the gradient of the pixels is not computed."""
    small = family()
    traced = trace_student(small, small.recipe.students[0], 16, 1)
    forward = traced.phases["forward"].plus(traced.phases["loss"])
    assert 1.8 < traced.phases["backward"].flops / forward.flops <= 2.3


def test_trace_student__a_group_shares_the_optimizer() -> None:
    small = family()
    alone, shared = (trace_student(small, small.recipe.students[1], 4, n) for n in (1, 4))
    sizes = [each.phases["optimizer"].other_bytes for each in (alone, shared)]
    assert sizes[0] / sizes[1] == pytest.approx(4.0, rel=0.01)
    # 47 bytes a number: the norm reads 4; AdamW 16 in, 16 out; the EMA 8 in, 4 and then 8 in and 4 out; 4 to fp32
    assert 40 < sizes[0] / alone.parameters < 80


def test_trace__without_heads(distill: Any) -> None:
    small = family("teacher.heads=none")
    assert small.teacher.heads is None
    traced = trace_student(small, small.recipe.students[0], 8, 1)
    assert traced.phases["loss"].launches > 0 and traced.phases["sinkhorn"].launches > 0
    assert trace_teacher(small).phases["heads"].launches < 20


@pytest.mark.slow
def test_bench_step__of_the_family_of_the_table_is_within_three_percent(distill: Any) -> None:
    """By the code of its time the table has 1 launch less for every attention, whose output is copied."""
    report = report_of(distill, "family_vit", "engine.micro_batch=16", "--ranks", "64")
    rows = {"teacher": report["teacher"], **report["networks"]}
    for name, (launches, tflop, other_mb, ms, mfu) in TABLE.items():
        row = rows[name]
        found = row["launches"], row["tflop"], row["other_mb"], row["ms"], 100 * row["mfu"]
        assert found == pytest.approx((launches, tflop, other_mb, ms, mfu), rel=0.03), name
        assert row["phases"].get("sinkhorn", {}).get("other_mb", 1939) == pytest.approx(
            1939, rel=0.01
        )
    assert report["ms_per_image"] == pytest.approx(52.9, rel=0.03)
