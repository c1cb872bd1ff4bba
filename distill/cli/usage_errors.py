"""Mistakes in a command's words as problems with a next move: verbs, options, what is missing."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.errors import RecipeError, UserError

# Words of other programs for what a command of this one does
OTHER_WORDS = {
    "resume": "train",
    "run": "train",
    "start": "train",
    "status": "watch",
    "evaluate": "eval",
    "score": "eval",
    "validate": "check",
    "init": "recipes copy",
    "version": "--version",
    "help": "--help",
}


def is_usage(error: Exception) -> bool:
    """Whether the words of the command could not be parsed; its exceptions have no public class."""
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def usage_problem(error: Any, words: Sequence[str]) -> UserError:
    """What is wrong with the words, and what to write instead; exit code 2, as of a wrong recipe."""
    context = getattr(error, "ctx", None)
    command = "distill" if context is None else str(context.command_path)
    option = getattr(error, "option_name", None)
    unknown = re.match(r"No such command '(.*?)'", str(error.message))
    if unknown and context is not None:
        return _no_such_command(unknown[1], context, words)
    if option and str(error.message).startswith("No such option") and context is not None:
        return _no_such_option(str(option), context, words)
    text = re.sub(r"^(Missing \w+ )'(.*?)'\.$", r"\1\2", error.format_message())
    usage = "" if context is None else f"{context.get_usage().removeprefix('Usage: ').strip()}; "
    return RecipeError(f"{command}: {text}", fix=f"Write {usage}{command} --help has more.")


def _no_such_command(word: str, context: Any, words: Sequence[str]) -> UserError:
    root = context.find_root().command
    known = list(context.command.commands)
    inside = [
        f"{name} {word}"
        for name, group in root.commands.items()
        if word in getattr(group, "commands", {})
    ]
    close = difflib.get_close_matches(word, known, n=1)
    path = str(context.command_path)
    fix = f"Give one of: {', '.join(known)}."
    if close:
        fix = f"Did you mean {path} {close[0]}?"
    elif inside:
        fix = f"Did you mean {' or '.join(f'distill {each}' for each in inside)}?"
    elif word in OTHER_WORDS:
        fix = f"Did you mean distill {OTHER_WORDS[word]}?"
    elif Path(word).suffix in {".yaml", ".yml"}:
        fix = f"A verb comes first: distill check {word}, distill train {word}."
    elif "=" in word:
        fix = f"A verb and a recipe come first: distill train RECIPE {' '.join(words)}."
    return RecipeError(f"{path}: no such command {word!r}", fix=fix)


def _no_such_option(option: str, context: Any, words: Sequence[str]) -> UserError:
    path, known = str(context.command_path), _options_of(context.command)
    position = next((n for n, word in enumerate(words) if word.split("=")[0] == option), len(words))
    given = words[position] if position < len(words) else option
    close = difflib.get_close_matches(option, known, n=1, cutoff=0.7)
    name = option.lstrip("-").replace("-", "_")
    key = next(iter(_keys_like(name)), None)
    if key is not None and not close:
        value = given.partition("=")[2]
        after = words[position + 1] if position + 1 < len(words) else ""
        if "=" not in given:
            value = "VALUE" if "=" in after or after.startswith("-") or not after else after
        return RecipeError(
            f"{path}: no such option {option}: keys of a recipe are written without dashes",
            fix=f"Write {key}={value}.",
        )
    fix = f"Did you mean {close[0]}?" if close else f"{path} --help lists: {', '.join(known)}."
    return RecipeError(f"{path}: no such option {option}", fix=fix)


def _options_of(command: Any) -> list[str]:
    """The long names of a command's options."""
    names = [name for each in command.params for name in getattr(each, "opts", ())]
    return [*(name for name in names if name.startswith("--")), "--help"]


def _keys_like(name: str) -> list[str]:
    """Keys of recipes with this dotted or last name, those outside of lists first; the name itself where it has a dot."""
    from distill.listing.problem_text import LISTS, path_of
    from distill.recipe.keys import FamilyRecipe, TeacherRecipe
    from distill.recipe.types import all_keys

    if "." in name or ":" in name:
        return [name]
    found = [each for kind in (FamilyRecipe, TeacherRecipe) for each in all_keys(kind)]
    found = [each for each in found if each[-1] == name]
    found.sort(key=lambda each: (not LISTS.isdisjoint(each), len(each)))
    return [path_of(each) for each in found]
