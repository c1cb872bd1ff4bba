"""What the text of ``data.sources`` stands for: ``~``, variables, ``{000..099}``, ``{a,b}``, ``*``, ``**``.

What is there under the name as it is written is taken as it is, whatever characters are in it.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from distill.errors import DataError
from distill.listing.passed_over import PassedOver
from distill.listing.walk import walk

MAX_PATHS = 1_000_000  # of one text with braces
MARKS = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{([^{}]*,[^{}]*|[^{}.]+\.\.[^{}.]+(?:\.\.-?\d+)?)\}")
RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.(-?\d+))?")


@dataclass(frozen=True)
class Expanded:
    """Paths that a text stands for, sorted; ``base`` is the folder above all of them, from which classes are counted."""

    base: Path
    paths: tuple[Path, ...]
    is_pattern: bool


def source_path(text: str) -> Path:
    """An absolute path; ``~`` and variables are replaced unless the path is there as it is written."""
    return Path(replace_variables(text)).absolute()


def replace_variables(text: str, folder: Path | None = None) -> str:
    """``~``, ``$NAME`` and ``${NAME}`` replaced, unless the path is there as it is written.

    ``folder`` is what a relative path is relative to.
    """
    if not text.startswith("~") and "$" not in text:
        return text
    written = text if folder is None else os.path.join(folder, text)  # noqa: PTH118  # keeps text
    if os.path.lexists(written):
        return text
    return os.path.expandvars(os.path.expanduser(text))  # noqa: PTH111  # keeps the text as it is


def expand(text: str, passed_over: PassedOver | None = None) -> Expanded:
    """Paths that are there.

    Raises:
        DataError: one is missing, or a pattern matches nothing.
    """
    path = source_path(text)
    if os.path.lexists(path):
        return Expanded(path, (path,), is_pattern=False)
    texts = expand_braces(str(path))
    expanded = [_expand_pattern(each, text, passed_over) for each in texts]
    if len(texts) == 1:
        return expanded[0]
    paths = dict.fromkeys(path for each in expanded for path in each.paths)
    bases = [each.base if each.is_pattern else each.base.parent for each in expanded]
    return Expanded(Path(os.path.commonpath(bases)), tuple(paths), is_pattern=True)


def expand_braces(text: str) -> list[str]:
    """``{a,b}`` and ``{000..099}`` (also ``{0..8..2}``, ``{a..e}``) written out as a shell does.

    Raises:
        DataError: they stand for too many.
    """
    texts, done = [text], False
    while not done:
        done, after = True, list[str]()
        for each in texts:
            match = next((m for m in BRACES.finditer(each) if _alternatives(m[1])), None)
            if match is None:
                after.append(each)
                continue
            done = False
            words = _alternatives(match[1])
            after += [each[: match.start()] + word + each[match.end() :] for word in words]
            if len(after) > MAX_PATHS:
                raise _too_many(text)
        texts = after
    return texts


def _alternatives(inner: str) -> Sequence[str]:
    if "," in inner:
        return inner.split(",")
    match = RANGE.fullmatch(inner)
    if match is None or match[1].isalpha() != match[2].isalpha():
        return ()
    is_text = match[1].isalpha()
    first, last = (ord(word) if is_text else int(word) for word in match.group(1, 2))
    step = max(1, abs(int(match[3] or 1)))
    numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    if len(numbers) > MAX_PATHS:
        raise _too_many(inner)
    if is_text:
        return [chr(value) for value in numbers]
    is_padded = any(
        word.lstrip("-").startswith("0") and len(word) > 1 for word in match.group(1, 2)
    )
    width = max(len(word) for word in match.group(1, 2)) if is_padded else 0
    return [f"{value:0{width}}" for value in numbers]


def _too_many(text: str) -> DataError:
    return DataError(
        f"data.sources: {text} stands for more than {MAX_PATHS:,} paths",
        fix="Give the folder, or a pattern such as FOLDER/*.tar.",
    )


def _expand_pattern(text: str, written: str, passed_over: PassedOver | None) -> Expanded:
    """A path without braces: itself, or what matches its ``*``, ``?``, ``[...]`` and ``**``."""
    base, rest = Path("/"), list(Path(text).parts[1:])
    while rest and (not MARKS.search(rest[0]) or os.path.lexists(base / rest[0])):
        base /= rest.pop(0)
    while rest and rest[-1] == "**":  # all below a folder is the folder
        rest.pop()
    if not rest:
        if not os.path.lexists(base):
            raise DataError(f"data.sources: {_shown(text, written)} is not there", fix=_fix(text))
        return Expanded(base, (base,), is_pattern=False)
    if not base.is_dir():
        raise DataError(
            f"data.sources: {_shown(text, written)} matches nothing: {base} is no folder",
            fix=_fix(text),
        )
    is_deep = "**" in rest
    walked = walk(
        str(base).rstrip("/"),
        wanted=lambda path: _matches(path.split("/"), rest),
        max_depth=None if is_deep else len(rest),
    )
    if passed_over is not None:
        passed_over.reasons.update(walked.reasons)
    folders = [each for each in walked.folders if _matches(each.split("/"), rest)]
    outer = set(folders)
    folders = [f for f in folders if not any(str(up) in outer for up in Path(f).parents)]
    matches = walked.files if is_deep and walked.files else [*walked.files, *folders]
    if not matches:
        raise DataError(
            f"data.sources: {_shown(text, written)} matches nothing",
            fix="Look at the pattern and the folder.",
        )
    matches.sort(key=lambda path: path.split("/"))
    return Expanded(base, tuple(base / each for each in matches), is_pattern=True)


def _shown(text: str, written: str) -> str:
    return written if text in (written, str(Path(written).absolute())) else f"{text} (of {written})"


def _fix(text: str) -> str:
    if "$" in text:
        return "Set the variable, or write the path out."
    return (
        "Give a folder, .tar shards, a .txt list of paths, a .parquet file, or a pattern of these."
    )


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
