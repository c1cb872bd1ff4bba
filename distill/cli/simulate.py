"""``distill plan --simulate``: its options as people write them."""

from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.options import print_json
from distill.errors import RecipeError
from distill.screen.console import make_console
from distill.screen.simulation import simulation_tables

if TYPE_CHECKING:
    from distill.bench.simulate import Assumptions, Chances
    from distill.plan.flops import Device
    from distill.recipe.keys import Recipe, TeacherRecipe

SimulateOption = Annotated[
    bool,
    typer.Option(
        "--simulate", help="Simulate days of a family's job with jitter, failures and saves."
    ),
]
JitterOption = Annotated[
    str | None,
    typer.Option("--jitter", metavar="N%", help="With --simulate: of a rank's step; 2%."),
]
MtbfOption = Annotated[
    str | None,
    typer.Option(
        "--mtbf",
        metavar="TIME/GPUS",
        help="With --simulate: mean time between failures of so many GPUs; 7.9h/1024.",
    ),
]
DaysOption = Annotated[float | None, typer.Option("--days", help="With --simulate; 30.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="With --simulate; 0.")]
AssumeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--assume",
        metavar="NAME=NUMBER",
        help="With --simulate: detect, restart, requeue in s; copy, send, disk, net in GB/s. May be repeated.",
    ),
]


def refuse_alone(*options: object) -> None:
    """Options of a simulation without it.

    Raises:
        RecipeError: there is one.
    """
    if any(option is not None for option in options):
        raise RecipeError(
            "--jitter, --mtbf, --days, --seed and --assume are for --simulate",
            fix="Add --simulate, or leave them away.",
        )


def show_simulation(
    recipe: "tuple[Recipe, TeacherRecipe | None]",
    num_ranks: int,
    device: "Device",
    chances: "Chances",
    assumed: "Assumptions",
    *,
    as_json: bool,
) -> None:
    """Simulates the first stage of a family and prints the figures.

    Raises:
        RecipeError: the recipe is a teacher's.
    """
    from distill.bench.simulate import simulate
    from distill.plan.teacher_source import teacher_shape
    from distill.recipe.keys import FamilyRecipe

    family, teacher = recipe
    if not isinstance(family, FamilyRecipe):
        raise RecipeError(
            f"--simulate: {family.name} has no students", fix="Give the recipe of a family."
        )
    first = family.at_stage(family.parts[0])
    shape = teacher_shape(first, teacher, has_files=False)
    report = simulate(first, shape, num_ranks, device, chances, assumed)
    if as_json:
        print_json({**report, "device": device.name})
        return
    for table in simulation_tables(report):
        make_console().print(table)
