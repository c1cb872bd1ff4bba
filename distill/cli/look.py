"""``distill look``: what networks see in pictures, as one PNG."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill.cli.options import (
    AllowCodeOption,
    DebugOption,
    JsonOption,
    allow_code_of,
    print_json,
    require_run,
    say,
)
from distill.errors import RecipeError
from distill.screen.console import printable

if TYPE_CHECKING:
    from distill.report.look import Viewed

ImagesArgument = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE...", help="Pictures, or builtin:NAME for a bundled photograph."),
]
TILE_PX = 1024


def look(
    images: ImagesArgument,
    networks: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="FOLDER|WEIGHTS|RUN[:NAME]", help="A network; repeat it."),
    ] = None,
    over_steps: Annotated[
        Path | None,
        typer.Option("--over-steps", metavar="RUN[:NAME]", help="Kept checkpoints of a run."),
    ] = None,
    size: Annotated[int, typer.Option("--size", help="Longer side in px, at most 4096.")] = 768,
    at: Annotated[
        list[str] | None,
        typer.Option(
            "--at",
            metavar="X,Y",
            help="The patch to compare with: 0.4,0.6 as fractions, 310,225 in px.",
        ),
    ] = None,
    tiles: Annotated[bool, typer.Option("--tiles", help="In overlapping tiles.")] = False,
    tile_size: Annotated[int, typer.Option("--tile-size", help="Of a tile, in px.")] = TILE_PX,
    no_foreground: Annotated[
        bool, typer.Option("--no-foreground", help="Colour all patches.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture.")] = Path("look.png"),
    allow: AllowCodeOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Show patch features of pictures as colours, and what resembles one patch, for several networks side by side."""
    import torch

    from distill.listing.decode import background_of
    from distill.report.look import LookRequest, check_request, parse_points, read_pictures
    from distill.report.look import look as render_look

    check_request(size, tile_size if tiles else None, out)
    with redirect_stdout(sys.stderr):
        viewed = _viewed(networks or [], over_steps, allow=allow)
        rgb = background_of("mean", viewed[0].preparation.mean)
        pictures = read_pictures(images, rgb)
        request = LookRequest(
            size, tile_size if tiles else None, not no_foreground, parse_points(at or [], pictures)
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        facts = render_look(pictures, viewed, request, out, _progress, device)
    if as_json:
        print_json(facts)
    else:
        say(f"wrote {out} in {facts['seconds']:.1f} s")


def _viewed(networks: list[Path], over_steps: Path | None, *, allow: bool) -> "list[Viewed]":
    from distill.evaluate.files import split_name
    from distill.report.viewed import networks_of, networks_over_steps

    if bool(networks) == (over_steps is not None):
        fix = "Give networks by --with RUN, or checkpoints by --over-steps RUN, not both."
        raise RecipeError("distill look: no network to look with, or two ways", fix=fix)
    named = networks if over_steps is None else [over_steps]
    for path in named:
        allow_code_of(path, allow)
    if over_steps is None:
        return networks_of(networks, _progress)
    require_run(split_name(over_steps)[0])
    return networks_over_steps(over_steps)


def _progress(text: str) -> None:
    sys.stderr.write(printable(text) + "\n")
