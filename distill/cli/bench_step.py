"""``distill bench step``: what a step needs of a GPU, counted without one."""

from typing import Annotated

import typer

from distill.cli.options import (
    AllowCodeOption,
    DebugOption,
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    allow_code,
    print_json,
    progress,
    say,
)
from distill.errors import RecipeError
from distill.screen.console import make_console

A_NODE = 8


def bench_step(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    device: Annotated[
        str, typer.Option("--device", help="h100, h200 or a100: the GPU of every rank.")
    ] = "h100",
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="Ranks of the step; 8 are a node.")
    ] = A_NODE,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compiled",
            help="Count what `engine.compile` gives a GPU, beside the step as written: torch's compiler for blocks, kernels without logits for loss and Sinkhorn. Needs a C++ compiler.",
        ),
    ] = False,
    allow: AllowCodeOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Count kernels, FLOPs and bytes of a family's step at true sizes, and estimate its time on a GPU. Needs none."""
    allow_code(allow, recipe)
    from distill.recipe.keys import FamilyRecipe
    from distill.recipe.reader import load_job

    loaded, teacher = load_job(recipe, list(overrides or []))
    if not isinstance(loaded, FamilyRecipe):
        raise RecipeError(f"{recipe}: not a family recipe", fix="Give one with students.")

    from distill.bench.roofline import find_hardware
    from distill.bench.step import StepRequest, step_lines, step_report, step_tables
    from distill.plan.teacher_source import teacher_shape

    hardware = find_hardware(device)  # before files are read
    shape = teacher_shape(loaded, teacher, has_files=False)
    request = StepRequest(loaded, shape, hardware, ranks, compiled)
    report = step_report(request, progress)
    if as_json:
        print_json(report)
        return
    for table in step_tables(report):
        make_console().print(table)
    for line in step_lines(report):
        say(line)
