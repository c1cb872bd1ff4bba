"""Commands and snippets that pages show: could they be typed? The parser of the command line reads them, nothing runs."""

import re
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from typer.main import get_command

from distill.cli.app import app
from distill.cli.usage_errors import is_usage
from distill.errors import RecipeError, UserError
from distill.listing.document import builtin_recipes
from distill.recipe.json_schema import KINDS
from distill.recipe.reader import load_recipe
from distill.screen.keys import keys
from tests.support.third_party import PROJECT, direct_dependencies

ROOT = Path(__file__).parents[2]
TEACHER = "teacher:"
FOLDERS = ("DIR", "SRC...", "EMB", "pictures")  # which must be there when a command is read


def blocks(page: str, *languages: str) -> list[str]:
    """The code blocks of a page in one of these languages; ``""`` is none."""
    found = re.findall(r"^```(\S*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def shown_commands(page: str) -> list[list[str]]:
    """The words of every command in a block without a language; what else stands there begins with no known program."""
    found: list[list[str]] = []
    for text in blocks(page, "", "sh", "bash", "console"):
        for line in text.splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:
                continue  # output with a lone quote
            found += _apart(words)
    return [words for words in found if words and words[0] in CHECKS]


def _apart(words: Sequence[str]) -> Iterator[list[str]]:
    """The commands of a line, between ``&&``."""
    command: list[str] = []
    for word in [*words, "&&"]:
        if word == "&&":
            yield command
            command = []
        else:
            command.append(word)


def named_commands(page: str) -> list[list[str]]:
    """The words of every ``distill ...`` within a line of text, which may hold placeholders."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    return [span.split() for span in re.findall(r"`distill ([a-z][^`]*)`", text)]


def problem_with(words: Sequence[str]) -> str:
    """Returns why a command could not be typed as it stands, or nothing."""
    return CHECKS[words[0]](list(words[1:]))


def problem_with_names(words: Sequence[str]) -> str:
    """Returns which verb or option of a command within a text there is not, or nothing."""
    command, rest, name = _command_of(words)
    if hasattr(command, "commands") and rest and rest[0] != "...":
        return f"distill {' '.join(words)}: {name} has no {rest[0]}"
    known = {option for param in command.params for option in param.opts} | {"--help"}
    given = {word.partition("=")[0] for word in rest if word.startswith("-") and word != "-"}
    return "" if given <= known else f"{name} has no {sorted(given - known)}"


def _command_of(words: Sequence[str]) -> tuple[Any, list[str], str]:
    """The innermost command, what is left of the words, and its full name."""
    command, rest, name = get_command(app), list(words), "distill"
    while hasattr(command, "commands") and rest and rest[0] in command.commands:
        name = f"{name} {rest[0]}"
        command = command.commands[rest.pop(0)]
    if name == "distill bench":
        command = command.commands["job"]  # its default
    return command, rest, name


def _distill(words: list[str]) -> str:
    folder = str(ROOT / "recipes")
    command, rest, name = _command_of([folder if w in FOLDERS else w for w in words])
    if hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        return f"{name}: no command {rest[0]}"
    try:
        given = command.make_context(name, rest).params
    except Exception as error:
        if not is_usage(error) and not isinstance(error, UserError):
            raise
        return f"{name}: {getattr(error, 'message', error)}"
    overrides = [text for text in given.get("overrides") or [] if not text.endswith(".json")]
    return _overrides_problem(str(given.get("recipe")), overrides)


def _overrides_problem(recipe: str, overrides: list[str]) -> str:
    """Reads a recipe that ships with these values; of another only the keys can be looked up."""
    builtin = builtin_recipes()
    path = builtin.get(Path(recipe).stem)
    try:
        if path is None:
            names = [text.removeprefix(TEACHER).partition("=")[0] for text in overrides]
            bare = [re.sub(r"\.\d+(?=\.|$)", "", name) for name in names]
            missing = [name for name in bare if not _is_known(name, known_keys())]
            return f"no key {missing}" if missing else ""
        mine = [text for text in overrides if not text.startswith(TEACHER)]
        load_recipe(path, mine)
        theirs = [text.removeprefix(TEACHER) for text in overrides if text.startswith(TEACHER)]
        if theirs:
            load_recipe(builtin["quickstart_teacher"], theirs)
    except RecipeError as error:
        return f"{recipe} {overrides}: {error.message}"
    return ""


def _make(words: list[str]) -> str:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    missing = {word for word in words if "=" not in word} - set(targets)
    return f"Makefile: no target {sorted(missing)}" if missing else ""


def _python(words: list[str]) -> str:
    module = words[1]
    return "" if words[0] == "-m" and find_spec(module) else f"no module {module}"


def _pytest(words: list[str]) -> str:
    paths = [word for word in words if word.startswith("tests")]
    missing = [path for path in paths if not (ROOT / path.partition("::")[0]).exists()]
    return f"no file {missing}" if missing else ""


def _pip(words: list[str]) -> str:
    extras = re.findall(rf"{PROJECT}\[([\w,]+)\]", " ".join(words))
    missing = set(",".join(extras).split(",")) - {"", *direct_dependencies().values()}
    return f"no extra {sorted(missing)}" if missing else ""


def _torchrun(words: list[str]) -> str:
    return _distill(words[words.index("distill") + 1 :])


CHECKS = {
    "distill": _distill,
    "make": _make,
    "python": _python,
    "pytest": _pytest,
    "pip": _pip,
    "torchrun": _torchrun,
}


def unknown_keys(snippet: str) -> list[str]:
    """Keys of a snippet of YAML that no recipe has; below ``args`` and ``extensions`` any may stand."""
    value = YAML(typ="safe").load(snippet)
    if not isinstance(value, dict) or set(value) & {"on", "jobs", "spec"}:
        return []
    return [path for path in _paths(value, "") if not _is_known(path, known_keys())]


@cache
def known_keys() -> frozenset[str]:
    """Every dotted key of both kinds of recipe, without positions in lists."""
    return frozenset(keys({}, KINDS))


def _paths(value: Any, above: str) -> Iterator[str]:
    if isinstance(value, dict) and not above.endswith((".args", "extensions", ".extra")):
        for key, item in value.items():
            yield from _paths(item, f"{above}.{key}".strip("."))
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item, above)
    else:
        yield above


def _is_known(path: str, known: frozenset[str]) -> bool:
    return path in known or any(name.startswith(f"{path}.") for name in known)
