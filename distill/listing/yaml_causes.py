"""Why a text is not YAML: what the reader found, as the mistake that people make, and where they made it."""

import re
from collections.abc import Sequence

from ruamel.yaml.error import MarkedYAMLError

from distill.errors import RecipeError, UserError
from distill.listing.document import NotYamlError, marked

KEY_WITHOUT_SPACE = re.compile(r"\s*(?:- )?[\w-]+:[^\s/:]\S*\s*$")
Mark = tuple[int, int]


def with_cause(problem: UserError) -> UserError:
    """Returns a problem of YAML with its probable cause, at the line and column of that; any other as it is."""
    error = problem.__cause__
    if not isinstance(problem, NotYamlError) or not isinstance(error, MarkedYAMLError):
        return problem
    (line, column), cause = find_cause(error, problem.lines)
    mark = marked(problem.lines, line, column)
    text = f"{problem.path}:{line + 1}:{column + 1}: {cause}\n{mark}"
    return RecipeError(text, fix="Correct the YAML there; nothing was started.")


def find_cause(error: MarkedYAMLError, lines: Sequence[str]) -> tuple[Mark, str]:
    """Where the mistake is, line and column from 0, and what it probably is, with the reader's words."""
    problem = str(error.problem or error.context).splitlines()[0].split(" with value ")[0]
    end, begin = error.problem_mark or error.context_mark, error.context_mark
    found = (0, 0) if end is None else (end.line, end.column)
    start = found if begin is None else (begin.line, begin.column)
    for find in (_of_scalars, _of_brackets, _of_lines):
        cause = find(problem, found, start, lines)
        if cause is not None:
            return cause[0], f"{cause[1]} ({problem})"
    return found, problem


def _line(lines: Sequence[str], line: int) -> str:
    return lines[line] if line < len(lines) else ""


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())


def _of_scalars(
    problem: str, found: Mark, start: Mark, lines: Sequence[str]
) -> tuple[Mark, str] | None:
    """Tabs, quotes, and what a value may not begin with."""
    text = _line(lines, start[0])[start[1] :]
    if "'\\t'" in problem:
        return found, "a tab: write spaces"
    if "escape" in problem:
        plain = text.partition('"')[2].partition('"')[0]
        return start, f"a backslash in double quotes has a meaning: write '{plain}'"
    if "end of stream" in problem and "bracket" not in problem:
        return start, f"a quote is never closed: {text[:1]}"
    if "undefined alias" in problem:
        return found, "a value that begins with * needs quotes"
    if begins := re.search(r"character '(.+)' that cannot start", problem):
        return found, f"a value that begins with {begins[1]} needs quotes"
    if twice := re.search(r'duplicate key "(.*?)"', problem):
        key = re.compile(rf"(^|[\s{{,]){re.escape(twice[1])}\s*:")
        first = next((n for n in range(start[0], found[0]) if key.search(lines[n])), start[0])
        return found, f"{twice[1]!r} is there twice, first in line {first + 1}: keep one"
    return None


def _of_brackets(
    problem: str, found: Mark, start: Mark, lines: Sequence[str]
) -> tuple[Mark, str] | None:
    """Brackets that are not closed, commas that are missing."""
    if begins := re.search(r"expected ',' or '([]}])', but got (.*)", problem):
        opened = {"]": "[", "}": "{"}[begins[1]]
        if begins[2] in ("']'", "'}'"):
            return found, f"{opened} is closed by {begins[2].strip(chr(39))}: write {begins[1]}"
        is_left = found[0] > start[0] and _indent(_line(lines, found[0])) <= _indent(
            lines[start[0]]
        )
        if "end>" in begins[2] or (is_left and start != (0, 0)):
            return start, f"a bracket is never closed: {opened}"
        return found, "a comma is missing before this"
    if re.search(r"found '[]}]'", problem):
        return found, "a bracket is closed that was never opened"
    return None


def _of_lines(
    problem: str, found: Mark, start: Mark, lines: Sequence[str]
) -> tuple[Mark, str] | None:
    """Spaces that are missing after ``:`` or ``-``, lines that do not stand where the others do."""
    last = max((n for n in range(found[0]) if _line(lines, n).split("#")[0].strip()), default=0)
    here, before = _line(lines, found[0]), _line(lines, last)
    if "another document" in problem:
        return found, "a second recipe begins at ---: keep one in a file"
    if "expected ':'" in problem:
        here, last = _line(lines, start[0]), start[0]
        if KEY_WITHOUT_SPACE.match(here):
            return (last, here.index(":")), "a space is missing after the colon"
        if re.match(r"\s*-\S", here):
            return (last, _indent(here)), "a space is missing after the dash"
        what = "write a colon and a space, no =" if "=" in here else "a colon is missing"
        return start, what
    for text, line in ((before, last), (here, found[0])):
        if KEY_WITHOUT_SPACE.match(text):
            return (line, text.index(":")), "a space is missing after the colon"
    odd = [q for q in "\"'" if here.count(q) % 2 or before.count(q) % 2]
    if "found '<scalar>'" in problem and odd:
        return found, f"a quote is never closed, here or above: {odd[0]}"
    if "mapping values" in problem and re.match(r"\s*-[^\s-]", here):
        return (found[0], _indent(here)), "a space is missing after the dash"
    if "mapping values" in problem and re.search(r":\s", here[: found[1]]):
        return found, "a value with a colon and a space in it needs quotes"
    if "mapping values" in problem or "block" in problem:
        text = f"this line begins {_indent(here)} spaces in, the one above {_indent(before)}"
        return (found[0], _indent(here)), f"{text}: keys of a group stand under each other"
    return None
