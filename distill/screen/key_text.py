"""Keys of recipes as text: one key for ``distill explain``, all keys for docs/recipe-keys.md."""

import difflib
import json
from collections.abc import Iterable, Mapping

from distill.errors import RecipeError
from distill.recipe.extension_keys import find_section, with_sections
from distill.recipe.json_schema import KINDS
from distill.screen.keys import Key, keys
from distill.screen.usage import reads_of_distill

HEAD = """\
# Recipe keys

Written by `distill schema --markdown > docs/recipe-keys.md`; a test compares the two.
`distill explain KEY` prints one key in the terminal.
*Science* keys decide the result and belong to a run; *machine* keys say where and how fast.
A key in a list is written without its position here, and with it in an override: `students.0.lr=1e-4`.
"""


def explained(name: str) -> list[Key]:
    """Returns what there is to say of a dotted key: one entry, or one for each kind of recipe.

    Positions in lists may be given: ``students.0.lr``.

    Raises:
        RecipeError: no recipe has this key.
    """
    bare = ".".join(part for part in name.split(".") if not part.isdecimal())
    kinds, (first, *rest) = KINDS, bare.split(".")
    if first == "extensions" and rest:
        sections = {rest[0]: find_section(rest[0])}
        kinds = {name: with_sections(kind, sections) for name, kind in KINDS.items()}
    known = keys({}, kinds)
    if bare in known:
        return keys(reads_of_distill() if kinds is KINDS else {}, kinds)[bare]
    last = bare.rpartition(".")[2]
    same_end = sorted((key for key in known if key.rpartition(".")[2] == last), key=len)
    close = [*difflib.get_close_matches(bare, known, n=1), *same_end]
    hint = f" - did you mean {close[0]!r}?" if close else ""
    raise RecipeError(
        f"{name}: no recipe has this key{hint}", fix="`distill schema --markdown` lists every key."
    )


def describe(key: Key) -> str:
    """Writes one key as lines for the terminal."""
    facts = {
        "type": key.type,
        "default": _default(key),
        "role": f"{key.role} ({'decides the result' if key.role == 'science' else 'where and how fast'})",
        "recipes": " and ".join(key.recipes),
        "since": f"recipe format {key.since}",
        "used in": ", ".join(key.used_in),
    }
    lines = [f"  {name:8} {text}".replace("`", "") for name, text in facts.items()]
    return "\n".join([key.name, f"  {key.meaning}".replace("`", ""), *lines])


def markdown() -> str:
    """Writes all keys as the page docs/recipe-keys.md."""
    by_section: dict[str, list[Key]] = {}
    for entries in keys(reads_of_distill()).values():
        for key in entries:
            by_section.setdefault(key.name.partition(".")[0], []).append(key)
    alone = {name: found for name, found in by_section.items() if len(found) == 1}
    parts = [HEAD, _table("The recipe", [found[0] for found in alone.values()])]
    parts += [_table(f"`{name}`", found) for name, found in by_section.items() if name not in alone]
    return "\n".join(parts)


def _table(title: str, found: Iterable[Key]) -> str:
    rows = [
        f"| `{key.name}` | {_escaped(key.meaning)} | {_escaped(key.type)} | {_escaped(_default(key))} "
        f"| {key.role} | {', '.join(key.recipes)} |"
        for key in found
    ]
    head = (
        "| key | meaning | type | default | role | recipes |\n| --- | --- | --- | --- | --- | --- |"
    )
    return "\n".join([f"## {title}", "", head, *rows, ""])


def _default(key: Key) -> str:
    if key.is_required:
        value = json.dumps(key.default)
        return "must be given" if key.default is None else f"{value} if its section is left out"
    if isinstance(key.default, Mapping):
        return "its keys' defaults"
    return json.dumps(key.default)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
