"""``distill doctor``, ``check`` and ``plan``: what can be checked before anything is trained."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill.bench.assumed import assumptions_of, chances_of
from distill.cli.options import (
    AllowCodeOption,
    CostsOption,
    DataOption,
    DebugOption,
    GpusOption,
    JsonOption,
    OverridesArgument,
    RanksOption,
    RecipeArgument,
    allow_code,
    count_ranks,
    join_launch,
    on_ranks,
    print_json,
    say,
    with_data,
)
from distill.cli.simulate import (
    AssumeOption,
    DaysOption,
    JitterOption,
    MtbfOption,
    SeedOption,
    SimulateOption,
    refuse_alone,
    show_simulation,
)
from distill.engine.variables import is_first
from distill.errors import DataError, RecipeError
from distill.screen.console import make_console

if TYPE_CHECKING:
    from distill.plan.flops import Device
    from distill.plan.job import JobPlan
    from distill.recipe.keys import Recipe, TeacherRecipe


def doctor(
    nodes: Annotated[
        bool,
        typer.Option(
            "--nodes", help="Compare all ranks of a launch: versions, clocks, disk, speed, network."
        ),
    ] = False,
    folder: Annotated[
        Path, typer.Option("--folder", help="With --nodes: where runs will be.")
    ] = Path("runs"),
    ranks: RanksOption = 1,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Check devices, libraries, decoders and disk; say how to fix what fails."""
    findings = _examine_nodes(folder, ranks) if nodes else _examine_machine()
    if not findings:
        return  # another rank reports
    if as_json:
        print_json(findings)
    else:
        for each in findings:
            say(f"{'ok  ' if each['is_ok'] else 'FAIL'}  {each['what']}: {each['found']}")
            if each["fix"]:
                say(f"      Fix: {each['fix']}")
    if not all(each["is_ok"] for each in findings):
        raise typer.Exit(3)


def _examine_machine() -> list[dict[str, Any]]:
    from distill.launch.doctor import examine

    return [finding.to_json() for finding in examine()]


def _examine_nodes(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """The findings of all ranks, on the first one."""
    from distill.engine.nodes import examine_nodes

    join_launch()
    found: list[dict[str, Any]] = on_ranks(partial(examine_nodes, folder.absolute()), ranks)
    return found if is_first(os.environ) else []


def check(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    data: DataOption = None,
    gpus: GpusOption = None,
    allow: AllowCodeOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Validate a recipe, its data and its plan; name the line that is wrong and the likely fix.

    Code that the recipe names is listed and not loaded, unless --allow-code is given.
    """
    from distill.recipe.reader import load_job
    from distill.screen.named_code import code_named_by

    allow_code(allow, recipe)
    try:
        texts = with_data(recipe, overrides, data)
        loaded, teacher = load_job(recipe, texts, check_folders=True, loads_sections=allow)
        recipes = (loaded,) if teacher is None else (loaded, teacher)
        code = [] if allow else [named for each in recipes for named in code_named_by(each)]

        from distill.job.initial import check_inits
        from distill.job.origin import licence_warning
        from distill.job.prepare import check_data
        from distill.listing.passed_over import PassedOver

        num_ranks = count_ranks(loaded.engine.processes, gpus)
        plans = (
            () if any(named.is_network for named in code) else _plans(loaded, teacher, num_ranks)
        )
        passed: dict[str, PassedOver] = {}
        starts = check_inits((loaded, teacher)) if plans else []
        facts = check_data(loaded, teacher, runs_code=allow, passed_over=passed)
        licence = licence_warning(loaded, teacher)
    except DataError as error:  # to a check, data that is not there is a wrong recipe
        raise RecipeError(error.message, fix=error.fix) from error

    from distill.screen.check_report import CheckReport

    report = CheckReport(loaded, teacher, num_ranks, plans, facts, code, licence, passed)
    if as_json:
        print_json(report.to_json())
        return
    for line in (*(each.describe() for each in starts), *report.lines()):
        say(line)


def _plans(
    recipe: "Recipe", teacher: "TeacherRecipe | None", num_ranks: int
) -> "tuple[JobPlan, ...]":
    """The plans of all parts, which fit this machine's GPU if it has one."""
    from distill.engine.device import has_gpu
    from distill.plan.flops import find_device  # these import torch
    from distill.plan.from_recipe import on_nodes_of
    from distill.plan.job import check_job, require_fit

    plans = check_job(on_nodes_of(recipe, num_ranks), teacher, num_ranks)
    if has_gpu(recipe.engine.device):
        for job in plans:
            require_fit(job, recipe, teacher, find_device("measured"))
    return plans


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=1, help="Number of ranks; by default this machine's."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            help="h100, h200, a100, rtx4090, rtx5090, cpu, or measured: this machine's; by default the recipe's here.",
        ),
    ] = None,
    costs: CostsOption = None,
    simulate: SimulateOption = False,
    jitter: JitterOption = None,
    mtbf: MtbfOption = None,
    days: DaysOption = None,
    seed: SeedOption = None,
    assume: AssumeOption = None,
    allow: AllowCodeOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Who trains where, who teaches how much, how long, how much memory. Trains nothing, needs no GPU.

    A recipe that names its teacher's arch is planned before the weights are there.
    """
    allow_code(allow, recipe)
    if simulate:
        chances, guesses = chances_of(jitter, mtbf, days, seed), assumptions_of(assume or [])
    else:
        refuse_alone(jitter, mtbf, days, seed, assume)

    from distill.recipe.reader import load_job

    loaded, teacher = load_job(recipe, list(overrides or []))

    from distill.plan.costs import read_costs
    from distill.plan.flops import find_device
    from distill.plan.from_recipe import on_nodes_of
    from distill.plan.here import device_here
    from distill.plan.job import check_job

    num_ranks = count_ranks(loaded.engine.processes, ranks)
    assumed = find_device(device) if device else device_here(loaded.engine.device, num_ranks)
    if costs is not None:
        assumed = replace(assumed, costs=read_costs(Path(costs)))
    placed = loaded if ranks is not None else on_nodes_of(loaded, num_ranks)  # this machine's
    if simulate:
        show_simulation((placed, teacher), num_ranks, assumed, chances, guesses, as_json=as_json)
        return
    plans = check_job(placed, teacher, num_ranks, assumed, has_files=False)
    _show_plans(plans, assumed, as_json=as_json)
    _judge_fit(plans, (loaded, teacher), assumed)


def _show_plans(plans: "Sequence[JobPlan]", assumed: "Device", *, as_json: bool) -> None:
    """The plans of all parts as tables, or that of the main part as JSON."""
    from distill.plan.here import THIS_CPU, estimate_basis
    from distill.plan.job import main_plan
    from distill.screen.tables import plan_tables

    if as_json:
        basis = estimate_basis(assumed)
        print_json({**main_plan(plans).to_json(), "device": assumed.name, "estimate": basis})
        return
    for each in plans:
        for table in plan_tables(each, assumed):
            make_console().print(table)
    other = "; for GPUs: --device h100" if assumed.name == THIS_CPU else ""
    say(f"for {assumed.name}{other}")


def _judge_fit(
    plans: "Sequence[JobPlan]", recipes: "tuple[Recipe, TeacherRecipe | None]", assumed: "Device"
) -> None:
    """Refuses plans that do not fit; warns of them on this CPU, where GiB are those of a GPU."""
    from distill.plan.here import THIS_CPU
    from distill.plan.job import require_fit

    for job in plans:
        if assumed.name != THIS_CPU:
            require_fit(job, *recipes, assumed)
        elif (
            needed := job.footprint.fullest
        ).total > assumed.memory_gib:  # --device cpu refuses it
            text = f"{job.name}: rank {job.footprint.fullest_rank} needs {needed.describe()}"
            sys.stderr.write(f"warning: {text}; {THIS_CPU} has {assumed.memory_gib:.0f} GiB\n")
