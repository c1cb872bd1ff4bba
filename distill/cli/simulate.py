"""``distill plan --simulate``: its options as people write them."""

import re
from dataclasses import fields, replace
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

SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
MOST_JITTER, MOST_DAYS = 1.0, 3650.0

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


def chances_of(
    jitter: str | None, mtbf: str | None, days: float | None, seed: int | None
) -> "Chances":
    """What is simulated, from the texts of the options.

    Raises:
        RecipeError: a text that cannot be read, or a number out of bounds.
    """
    from distill.bench.simulate import Chances

    text = "30" if days is None else f"{days:g}"
    if not 0.0 < float(text) <= MOST_DAYS:
        raise RecipeError(
            f"--days {text}: not above 0 and at most {MOST_DAYS:.0f}", fix="Write --days 30."
        )
    return Chances(
        read_jitter(jitter or "2%"), _mtbf_s(mtbf or "7.9h/1024"), float(text), seed or 0
    )


def read_jitter(text: str) -> float:
    """The part that ``2%`` is.

    Raises:
        RecipeError: it is no percentage from 0 to 100.
    """
    match = re.fullmatch(NUMBER + r"\s*%", text)
    if match is None or float(match[1]) > 100 * MOST_JITTER:
        fix = "Write --jitter 2%."
        raise RecipeError(f"--jitter {text}: not a percentage from 0% to 100%", fix=fix)
    return float(match[1]) / 100.0


def _mtbf_s(text: str) -> float:
    """Mean seconds between failures of one GPU, from ``7.9h/1024``."""
    match = re.fullmatch(NUMBER + r"\s*(s|min|h|d)\s*/\s*(\d{1,9})", text)
    if match is None or not float(match[1]) or not int(match[3]):
        raise RecipeError(
            f"--mtbf {text}: not TIME/GPUS, a time above 0 in s, min, h or d for so many GPUs",
            fix="Write --mtbf 7.9h/1024.",
        )
    return float(match[1]) * SECONDS[match[2]] * int(match[3])


def assumptions_of(texts: list[str]) -> "Assumptions":
    """The assumptions, with those of the texts in their place.

    Raises:
        RecipeError: a name that is not known, or no number above 0 (a time may be 0).
    """
    from distill.bench.simulate import Assumptions

    known = [field.name for field in fields(Assumptions)]
    assumed = Assumptions()
    for text in texts:
        name, _, number = text.partition("=")
        may_be_zero = name in ("detect", "restart", "requeue")
        is_number = re.fullmatch(NUMBER, number) is not None
        if name not in known or not is_number or not (float(number) or may_be_zero):
            raise RecipeError(
                f"--assume {text}: not NAME=NUMBER with one of {', '.join(known)}",
                fix="Write --assume restart=60 (seconds) or --assume copy=6.8 (GB/s).",
            )
        assumed = replace(assumed, **{name: float(number)})
    return assumed


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
