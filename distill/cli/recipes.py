"""``distill recipes``: what ships, and copies of it to change."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from distill.cli.options import JsonOption, RecipeArgument, print_json, say
from distill.screen.console import printable

recipes_app = typer.Typer(help="List, show and copy the built-in recipes.", no_args_is_help=True)


@recipes_app.command("list")
def list_recipes(as_json: JsonOption = False) -> None:
    """Names of the built-in recipes and what each is for."""
    from distill.listing.document import builtin_recipes

    titles = {
        name: path.read_text().splitlines()[0].removeprefix("# ")
        for name, path in builtin_recipes().items()
    }
    if as_json:
        print_json(titles)
        return
    for name, title in titles.items():
        say(f"{name:22} {title}")


@recipes_app.command("show")
def show_recipe(recipe: RecipeArgument) -> None:
    """Print a recipe."""
    from distill.listing.document import find_recipe

    sys.stdout.write(printable(find_recipe(recipe).read_text()))


@recipes_app.command("copy")
def copy_recipe(
    recipe: RecipeArgument, target: Annotated[Path, typer.Argument(metavar="FILE")]
) -> None:
    """Copy a recipe, and the teacher recipe it names, to new files."""
    from distill.recipe.recipe_copy import copy_recipe as copy

    for path in copy(recipe, target):
        say(f"wrote {path}")
