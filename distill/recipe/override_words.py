"""The words KEY=VALUE of a command, checked for their form before a recipe is read."""

from collections.abc import Sequence

from distill.errors import RecipeError

EXAMPLE = "such as schedule.batch=32"


def check_form(words: Sequence[str] | None) -> list[str] | None:
    """Returns the words of a command as they are.

    Raises:
        RecipeError: each that is no ``KEY=VALUE``, with what to write, and each key that is given twice.
    """
    given: dict[str, str] = {}
    wrong = []
    for word in _joined(words or ()):
        key, equals, value = word.partition("=")
        text = _wrong_form(key, equals, value) or _undone(key, value, given)
        if text:
            wrong.append(f"override {word!r}: {text}")
        given[key] = value
    if wrong:
        raise RecipeError("\n".join(wrong), fix="Correct these words; nothing was started.")
    return None if words is None else list(words)


def _joined(words: Sequence[str]) -> list[str]:
    """The words without files, with ``KEY = VALUE`` and ``KEY VALUE``, which a shell split at the spaces, in one."""
    texts: list[str] = []
    for word in words:
        is_rest = word.startswith("=") or "=" not in word
        if "=" not in word and word.endswith(".json"):  # a file that `bench --json` writes
            continue
        if texts and is_rest and (texts[-1].endswith("=") or "=" not in texts[-1]):
            texts[-1] += f" {word}"
        else:
            texts.append(word)
    return texts


def _wrong_form(key: str, equals: str, value: str) -> str:
    """What to write instead; '' where the form is right."""
    if not equals and key.endswith((".yaml", ".yml")):
        return "one recipe at a time; after it write KEY=VALUE"
    parts = f"{key}{equals}{value}".replace("=", " ", 1).split()
    if len(parts) == 2 and (not equals or key != key.strip() or value != value.strip()):
        return f"write {'='.join(parts)}, with = and without spaces"
    if not equals and ":" in key.removeprefix("teacher:"):
        name, _, rest = key.rpartition(":")
        return f"write {name}={rest.strip()}, with = and not :"
    if key.startswith("-"):
        return f"write {key.lstrip('-')}={value}, without dashes"
    if not equals or not all(key.removeprefix("teacher:").strip().split(".")):
        return f"write KEY=VALUE, {EXAMPLE}"
    return "" if value.strip() else f"no value: write {key}=VALUE, or {key}=null for none"


def _undone(key: str, value: str, given: dict[str, str]) -> str:
    """What of earlier words this one would replace; '' for nothing."""
    if key in given:
        both = f"given twice, {given[key]} and {value}"
        return "" if given[key] == value else f"{both}: keep one"
    inside = next((each for each in given if each.startswith(f"{key}.")), None)
    return f"replaces {inside}={given[inside]} before it: put it first" if inside else ""
