"""What the text of ``data.sources`` stands for: ``~``, variables, ``{000..099}``, ``{a,b}``, ``*``, ``**``.

What is there under the name as it is written is taken as it is, whatever characters are in it.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from distill.errors import DataError
from distill.listing.passed_over import PassedOver
from distill.listing.walk import Walked, walk

MAX_PATHS = 1_000_000  # of one text with braces
MARKS = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{([^{}]*,[^{}]*|[^{}.]+\.\.[^{}.]+(?:\.\.-?\d+)?)\}")
FIX = "Give a folder, .tar shards, a .txt list of paths, a .parquet file, or a pattern of these."
Pattern = tuple[str, ...]  # parts of a path
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
    parted = [_part(each) for each in texts]
    walks = _walk_all([each for each in parted if each[1]], passed_over)
    expanded, empty = list[Expanded](), list[str]()
    for each, (base, rest) in zip(texts, parted, strict=True):
        shown = text if each in (text, str(path)) else f"{each} (of {text})"
        paths = _matches_of(base, rest, walks) if rest else [base]
        if not rest and not os.path.lexists(base):
            unset = re.search(r"\$\{?(\w+)", each)
            why = f" ({unset[1]} is not set)" if unset else ""
            raise DataError(f"data.sources: {shown} is not there{why}", fix=FIX)
        if paths:
            expanded.append(Expanded(base, tuple(paths), is_pattern=bool(rest)))
        else:
            empty.append(f"{shown} matches nothing")
    if not expanded:
        raise DataError(
            f"data.sources: {empty[0]}", fix="Look at the pattern, the variables and the folder."
        )
    if passed_over is not None:
        passed_over.remarks.extend(empty)
    if len(texts) == 1:
        return expanded[0]
    paths = list(dict.fromkeys(path for each in expanded for path in each.paths))
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


def _part(text: str) -> tuple[Path, Pattern]:
    """A path without braces as the folder before its first ``*``, ``?``, ``[...]``, and what follows."""
    base, rest = Path("/"), list(Path(text).parts[1:])
    while rest and (not MARKS.search(rest[0]) or os.path.lexists(base / rest[0])):
        base /= rest.pop(0)
    while rest and rest[-1] == "**":  # all below a folder is the folder
        rest.pop()
    return base, tuple(rest)


def _depth(pattern: Pattern) -> int | None:
    return None if "**" in pattern else len(pattern)


def _walk_all(
    parted: Sequence[tuple[Path, Pattern]], passed_over: PassedOver | None
) -> dict[tuple[Path, int | None], Walked]:
    """Walks every folder once for all patterns that begin at it and reach as deep."""
    patterns: dict[tuple[Path, int | None], list[Pattern]] = {}
    for base, rest in parted:
        patterns.setdefault((base, _depth(rest)), []).append(rest)
    walks = {}
    for (base, depth), given in patterns.items():
        if not base.is_dir():
            walks[base, depth] = Walked()
            continue
        wanted = partial(_matches_any, given)
        walks[base, depth] = walk(str(base).rstrip("/"), wanted=wanted, max_depth=depth)
        if passed_over is not None:
            passed_over.reasons.update(walks[base, depth].reasons)
    return walks


def _matches_of(
    base: Path, rest: Pattern, walks: Mapping[tuple[Path, int | None], Walked]
) -> list[Path]:
    """What a pattern matches: files and folders, with ``**`` folders only where it matches no files."""
    walked = walks[base, _depth(rest)]
    files = [each for each in walked.files if _matches(each.split("/"), rest)]
    folders = [each for each in walked.folders if _matches(each.split("/"), rest)]
    outer = set(folders)
    folders = [f for f in folders if not any(str(up) in outer for up in Path(f).parents)]
    matches = files if "**" in rest and files else [*files, *folders]
    return [base / each for each in sorted(matches, key=lambda path: path.split("/"))]


def _matches_any(patterns: Sequence[Pattern], path: str) -> bool:
    parts = path.split("/")
    return any(_matches(parts, pattern) for pattern in patterns)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
