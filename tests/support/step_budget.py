"""The budget of family_vit: launches and bytes of every network at true width, with two blocks each.

python -m tests.support.step_budget             writes what is counted now to tests/fixtures/step-budget.json
                                                and, compiled, to tests/fixtures/step-budget-compiled.json
python -m tests.support.step_budget compiled    prints what is counted now, compiled, of the teacher and two students
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distill.bench.compiled_work import Compiler
from distill.bench.meta_work import FamilyWork, Traced, trace_student, trace_teacher
from distill.plan.from_recipe import TeacherShape
from distill.plan.teacher_source import teacher_shape
from distill.recipe.keys import FamilyRecipe
from distill.recipe.reader import load_job
from teacher.shapes import ViTSpec

FILE = Path(__file__).parent.parent / "fixtures" / "step-budget.json"
COMPILED_FILE = FILE.with_name("step-budget-compiled.json")
ACCEPT = "python -m tests.support.step_budget"
BLOCKS, IMAGES = 2, 16
GROWTH = 1.02
CUT = (
    "{name: vits16, arch: vit, width: 384, depth: 2, heads: 6, patch: 16}",
    "{name: vits16plus, arch: vit, width: 384, depth: 2, heads: 6, patch: 16, ffn: swiglu}",
    "{name: vitb16, arch: vit, width: 768, depth: 2, heads: 12, patch: 16}",
    "{name: vitl16, arch: vit, width: 1024, depth: 2, heads: 16, patch: 16}",
    "{name: vith16plus, arch: vit, width: 1280, depth: 2, heads: 20, patch: 16, ffn: swiglu}",
)
CUT_COMPILED = (CUT[0], CUT[4])
Figures = dict[str, dict[str, int]]


def counted_now(students: Sequence[str] = CUT, compiler: Compiler | None = None) -> Figures:
    """Launches and bytes of a micro-batch by network, and of Sinkhorn."""
    recipe, teacher = load_job("family_vit", [f"students=[{', '.join(students)}]"])
    assert isinstance(recipe, FamilyRecipe)
    shape = teacher_shape(recipe, teacher, has_files=False)
    assert isinstance(shape.spec, ViTSpec)
    family = FamilyWork(recipe, TeacherShape(replace(shape.spec, depth=BLOCKS), shape.heads))
    figures = {"teacher": _figures(trace_teacher(family, compiler))}
    for student in recipe.students:
        figures[student.label] = _figures(trace_student(family, student, IMAGES, 1, compiler))
    return figures


def _figures(traced: Traced) -> dict[str, int]:
    counts = {"": traced.per_micro_batch}
    counts |= {f"{name}_": traced.phases[name] for name in ("sinkhorn",) if name in traced.phases}
    return {
        f"{name}{key}": getattr(counted, key)
        for name, counted in counts.items()
        for key in ("launches", "matmul_bytes", "other_bytes")
    }


def exceeded(now: Figures, budget: Figures) -> list[str]:
    """A line for every figure that has grown by more than 2%."""
    return [
        f"{name}: {key} {now[name][key]:,}, the budget is {most:,}; if that is meant, accept it by `{ACCEPT}`"
        for name, figures in budget.items()
        for key, most in figures.items()
        if now[name][key] > GROWTH * most
    ]


if __name__ == "__main__":
    compiled = json.dumps(counted_now(CUT_COMPILED, Compiler()), indent=1) + "\n"
    if sys.argv[1:] == ["compiled"]:
        sys.stdout.write(compiled)
    else:
        FILE.write_text(json.dumps(counted_now(), indent=1) + "\n")
        COMPILED_FILE.write_text(compiled)
