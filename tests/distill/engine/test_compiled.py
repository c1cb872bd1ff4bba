"""Compiled parts equal the same as written: in a process of its own, since the compiler would trace the suite's shape checks."""

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from students.shapes import CATALOG, ViTSpec
from tests.support.exports import write_network
from tests.support.jobs import ENVIRONMENT, run_distill, weights_of, write_images

ROOT = Path(__file__).parents[3]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


@cache
def facts_of(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.compiled", *words]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOG)
def test_compile_parts__blocks_of_the_catalogue_are_one_graph_a_shape(name: str) -> None:
    """Two sizes of crops: of a ViT's blocks two graphs, however many there are; of a ConvNeXt's two for each width."""
    facts = facts_of("graphs")[name]
    assert facts["graphs"] == (8 if "convnext" in name else 2)
    assert facts["breaks"] == 0 and not facts["lines"] and facts["names"]
    assert facts["features"] < 1e-6 and facts["gradients"] < 1e-6


@pytest.mark.slow
def test_compile_parts__a_custom_student_is_compiled_in_full_or_not_at_all() -> None:
    facts = facts_of("graphs")
    plain, branching, normed = (facts[name] for name in ("Plain", "Branching", "Normed"))
    assert plain["graphs"] == 2 and plain["breaks"] == 0 and not plain["lines"]
    assert plain["features"] < 1e-6 and plain["gradients"] < 1e-6
    assert branching["graphs"] == normed["graphs"] == 0
    assert "not one graph" in branching["lines"][0] and "BatchNorm" in normed["lines"][0]


def test_chunks__have_one_graph_a_step_and_equal_what_is_written() -> None:
    """A second temperature makes no graph: of Sinkhorn's chunk of 256 rows three, of the cross-entropy two."""
    facts = facts_of("chunks", "aot_eager")
    assert facts["graphs"] == 5 and facts["apart"] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "zero", "most"), [("fp32", 1, 1e-6), ("bf16", 2, 1e-2)])
def test_engine__trains_a_compiled_task_as_it_is_written(
    precision: str, zero: int, most: float
) -> None:
    """Four steps of two micro-batches: gradients reach DeepSpeed's hooks from compiled blocks."""
    facts = facts_of("steps", "aot_eager", precision, str(zero))
    assert facts["moved"] > 1e-3
    assert facts["losses"] < most and facts["norms"] < most and facts["weights"] < most


@pytest.mark.slow
@needs_compiler
def test_engine__trains_with_kernels_of_the_compiler_as_it_is_written() -> None:
    facts = facts_of("steps", "inductor", "fp32", "1")
    assert facts["moved"] > 1e-3
    assert facts["losses"] < 1e-6 and facts["norms"] < 1e-5


@pytest.mark.slow
def test_compile_parts__a_teacher_may_be_sharded_afterwards() -> None:
    """Parts are gathered around the forward function that is compiled: the same bits, from one graph."""
    assert facts_of("sharded") == dict.fromkeys(("rank-0", "rank-1"), "True, 1 graphs")


RECIPE = """\
name: tiny
format: 3
teacher: {weights: TEACHER, heads: none}
students: [{name: plain, arch: vit, width: 16, depth: 1, heads: 2, patch: 8}]
data: {sources: [{path: "DATA"}]}
crops: {global: {size: 32}, local: {count: 2, size: 16}, flip: 0.5}
schedule: {batch: 16, steps: 4, lr: {peak: 1.0e-3, warmup: 1}}
engine: {device: cpu, processes: 2, precision: fp32}
"""


@pytest.mark.slow
@needs_compiler
def test_train__with_engine_compile_two_ranks_end_near_those_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = tmp_path / "kernels"
    monkeypatch.setitem(ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR", str(kernels))
    teacher = write_network(tmp_path / "teacher", ViTSpec(24, 2, 2, 48, patch=8))
    text = RECIPE.replace("TEACHER", str(teacher))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(text.replace("DATA", str(write_images(tmp_path / "images"))))
    ends = {}
    for wanted in ("false", "true"):
        assert not list(kernels.rglob("*.so")), "the run before compiles nothing"
        words = f"engine.compile={wanted}", "--out", str(tmp_path / wanted)
        ended = run_distill("train", str(recipe), *words)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        rows = (tmp_path / wanted / "tiny/metrics/plain.jsonl").read_text().splitlines()
        ends[wanted] = json.loads(rows[-1])["loss"], weights_of(tmp_path / wanted / "tiny")["plain"]
    assert list(kernels.rglob("*.so"))
    (loss, weights), (eager_loss, eager_weights) = ends["true"], ends["false"]
    assert loss == pytest.approx(eager_loss, rel=1e-5)
    for name, tensor in weights.items():
        assert float((tensor - eager_weights[name]).abs().max()) < 1e-4, name
