"""``distill weights``: look into files of weights, convert them, learn the heads that released teachers lack."""

from itertools import islice
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

PrefixOption = Annotated[
    str | None,
    typer.Option(
        "--prefix",
        metavar="PREFIX",
        help="Which backbone of a file that holds several: what stands before its names.",
    ),
]
weights_app = typer.Typer(
    help="Inspect and convert weights; fit the heads a released teacher lacks.",
    no_args_is_help=True,
)

MOST_ENTRIES = 100_000  # of a folder that are looked at to name what it is
WEIGHT_SUFFIXES = {".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz", ".h5", ".msgpack"}
OTHER_KINDS = {
    **dict.fromkeys(
        (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"), "a picture"
    ),
    **dict.fromkeys((".yaml", ".yml"), "a recipe"),
    **dict.fromkeys((".tar", ".parquet"), "a container of images"),
    **dict.fromkeys((".zip", ".gz", ".tgz", ".7z"), "an archive, to be unpacked first"),
    **dict.fromkeys((".txt", ".md", ".log", ".json", ".jsonl", ".csv"), "a text"),
    ".onnx": "an ONNX file, which holds a network to run",
    ".py": "a program",
}


@weights_app.command("inspect")
def inspect_weights(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="A folder, a .safetensors or a .pth file.")
    ],
    check_values: Annotated[
        bool, typer.Option("--check-values", help="Read every number and look for NaN.")
    ] = False,
    prefix: PrefixOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Name what a file of weights is, without executing anything in it."""
    from distill.screen.tables import inspection_table
    from distill.weights.inspect import inspect

    refuse_other_kinds(path)
    found = inspect(path, check_values=check_values, prefix=prefix)
    if as_json:
        print_json(found.to_json())
    else:
        make_console().print(inspection_table(found))


def refuse_other_kinds(path: Path) -> None:
    """Names what a path is that holds no weights, and which command is for it.

    Raises:
        RecipeError: it is not there, or is something else.
    """
    if not path.exists():
        raise RecipeError(f"{path}: no such file or folder", fix="Check the path.")
    names = [path] if path.is_file() else sorted(path.iterdir())
    kinds = {each.suffix.lower() for each in names}
    if kinds & WEIGHT_SUFFIXES or (path.is_file() and not kinds & OTHER_KINDS.keys()):
        return
    if (path / "job.json").is_file():
        inside = sorted(each.parent for each in path.glob("students/*/config.json"))
        example = inside[0] if inside else path / "students" / "NAME"
        raise RecipeError(
            f"{path}: a run folder, not weights", fix=f"Give a network of it, such as {example}."
        )
    from distill.listing.sources import SUFFIXES

    entries = list(islice(path.rglob("*"), MOST_ENTRIES))
    pictures = [each for each in entries if each.suffix.lower() in SUFFIXES]
    more = " or more" if len(entries) == MOST_ENTRIES else ""
    if path.is_dir() and pictures:
        text, fix = (
            f"a folder of {len(pictures):,}{more} pictures",
            f"Use distill data check {path}.",
        )
    elif path.is_dir():
        below = next((e.parent for e in entries if e.suffix == ".safetensors"), None)
        text = "a folder without weights" if names else "an empty folder"
        fix = f"Did you mean {below}?" if below else "Give one with model.safetensors, or a file."
    else:
        text = OTHER_KINDS[path.suffix.lower()]
        fix = "Give a folder, a .safetensors or a .pth file."
    raise RecipeError(f"{path}: {text}, not weights", fix=fix)


@weights_app.command("convert")
def convert_weights(
    source: Annotated[Path, typer.Argument(metavar="SOURCE")],
    target: Annotated[Path, typer.Argument(metavar="TARGET")],
    layout: Annotated[WeightLayout, typer.Option("--to", help="Whose names the tensors get.")],
    dtype: Annotated[Precision, typer.Option("--dtype")] = Precision.FP32,
    prefix: PrefixOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Write a backbone in another layout: a folder for hf and timm, a .pth file for meta."""
    import torch

    from distill.export.convert import convert
    from distill.export.licences import pass_on
    from distill.screen.tables import inspection_table

    refuse_other_kinds(source)
    kind = torch.bfloat16 if dtype == Precision.BF16 else torch.float32
    found = convert(source, target, layout=layout.value, dtype=kind, prefix=prefix)
    licences = pass_on(source, target)
    if as_json:
        print_json(found.to_json())
    else:
        make_console().print(inspection_table(found))
        if licences.texts:
            where = "lie in it" if target.is_dir() else f"are in {source}: send them along"
            say(f"its licence files {where}: {', '.join(licences.texts)}")


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
