"""``distill weights``: look into files of weights, convert them, learn the heads that released teachers lack."""

from pathlib import Path
from typing import Annotated

import typer

from distill.cli.export import Precision, WeightLayout
from distill.cli.options import (
    AllowCodeOption,
    DataOption,
    DebugOption,
    FreshOption,
    GpusOption,
    JsonOption,
    NameOption,
    OutOption,
    OverridesArgument,
    PlainOption,
    RecipeArgument,
    allow_code,
    print_json,
    say,
    with_data,
)
from distill.errors import RecipeError
from distill.screen.console import make_console

weights_app = typer.Typer(
    help="Inspect and convert weights; fit the heads a released teacher lacks.",
    no_args_is_help=True,
)


@weights_app.command("inspect")
def inspect_weights(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="A folder, a .safetensors or a .pth file.")
    ],
    check_values: Annotated[
        bool, typer.Option("--check-values", help="Read every number and look for NaN.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Name what a file of weights is, without executing anything in it."""
    from distill.screen.tables import inspection_table
    from distill.weights.inspect import inspect

    found = inspect(path, check_values=check_values)
    if as_json:
        print_json(found.to_json())
    else:
        make_console().print(inspection_table(found))


@weights_app.command("convert")
def convert_weights(
    source: Annotated[Path, typer.Argument(metavar="SOURCE")],
    target: Annotated[Path, typer.Argument(metavar="TARGET")],
    layout: Annotated[WeightLayout, typer.Option("--to", help="Whose names the tensors get.")],
    dtype: Annotated[Precision, typer.Option("--dtype")] = Precision.FP32,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Write a backbone in another layout: a folder for hf and timm, a .pth file for meta."""
    import torch

    from distill.screen.tables import inspection_table
    from distill.weights.convert import convert

    kind = torch.bfloat16 if dtype == Precision.BF16 else torch.float32
    found = convert(source, target, layout=layout.value, dtype=kind)
    if as_json:
        print_json(found.to_json())
    else:
        make_console().print(inspection_table(found))


@weights_app.command("fit-heads")
def fit_heads(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    data: DataOption = None,
    gpus: GpusOption = None,
    out: OutOption = Path("runs"),
    name: NameOption = None,
    fresh: FreshOption = False,
    plain: PlainOption = False,
    allow: AllowCodeOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Learn DINO and iBOT heads on a frozen teacher, as the first phase of a family's job.

    The recipe has teacher.heads: fit. ``distill train`` with the same recipe continues from there;
    the file can be given to other recipes as teacher.heads.
    """
    from distill.job.prepare import FITTED_HEADS
    from distill.launch.local import Options, run
    from distill.recipe.keys import HEADS_PHASE, FamilyRecipe
    from distill.recipe.reader import load_job

    allow_code(allow, recipe)
    texts = with_data(recipe, overrides, data)
    loaded = load_job(recipe, texts)[0]
    if not isinstance(loaded, FamilyRecipe) or loaded.teacher.heads_mode != "fit":
        raise RecipeError(f"{recipe}: has no heads to fit", fix="Write teacher.heads: fit in it.")
    options = Options(gpus, out, name, fresh, plain, until=HEADS_PHASE)
    code = run(recipe, texts, options)
    if code == 0:
        say(f"wrote {out / (name or loaded.name) / FITTED_HEADS}")
    raise typer.Exit(code)
