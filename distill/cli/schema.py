"""``distill schema`` and ``distill explain``: the keys of a recipe, for editors and for people."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from distill.cli.options import DebugOption, JsonOption, print_json, say
from distill.errors import RecipeError


def schema(
    kind: Annotated[
        str, typer.Argument(metavar="[family|teacher]", help="Which recipe; by default family.")
    ] = "family",
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Every key of both recipes as a page of tables.")
    ] = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Print the JSON Schema of a recipe, which editors complete and check keys with."""
    from distill.recipe.json_schema import KINDS, schema_text
    from distill.screen.key_text import markdown

    if kind not in KINDS:
        raise RecipeError(f"{kind}: no kind of recipe", fix=f"Give one of: {', '.join(KINDS)}.")
    sys.stdout.write(markdown() if as_markdown else schema_text(KINDS[kind]))


def explain(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A dotted key, such as schedule.ema.")],
    as_json: JsonOption = False,
    debug: DebugOption = False,  # noqa: ARG001  # read by main
) -> None:
    """Explain one key of a recipe: meaning, type, default, whether it decides the result, who reads it."""
    from distill.screen.key_text import describe, explained

    entries = explained(key)
    if as_json:
        print_json({"key": entries[0].name, "entries": [asdict(entry) for entry in entries]})
        return
    say("\n".join(describe(entry) for entry in entries))
