"""docs/cli.md from the command line itself: ``python -m tests.support.cli_page`` writes it, a test compares it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from typer.main import get_command

from distill.cli.app import app

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
HEAD = """\
# Command line

`python -m tests.support.cli_page` writes this page from the commands; a test compares the two.
`distill COMMAND --help` prints the same in the terminal.
Exit codes: 0 done, or saved and stopped by SIGTERM; 1 failed; 2 wrong recipe or usage; 3 the machine lacks something; 4 a rank died or hung; 5 finished with a parked student; 130 saved and stopped by Ctrl-C.
With `--json` standard output holds one JSON object and nothing else.
"""


def commands() -> Iterator[tuple[str, Any]]:
    """Words behind ``distill`` and the command that they run, groups before their commands."""
    yield from _below("", get_command(app))


def _below(words: str, group: Any) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        full = f"{words} {name}".strip()
        if not command.hidden:
            yield full, command
            if hasattr(command, "commands"):
                yield from _below(full, command)


def page() -> str:
    """The text of docs/cli.md: the commands of each panel of ``distill --help``."""
    by_panel: dict[str, list[tuple[str, Any]]] = {}
    panel = ""
    for words, command in commands():
        panel = command.rich_help_panel if " " not in words else panel
        by_panel.setdefault(panel, []).append((words, command))
    parts = [HEAD]
    for title, found in by_panel.items():
        parts.append(f"## {title}\n")
        parts += [_section(words, command) for words, command in found]
    return "\n".join(parts)


def _section(words: str, command: Any) -> str:
    lines = [f"### distill {words}", "", *_sentences(command.help or "")]
    given = [param for param in command.params if not getattr(param, "hidden", False)]
    if hasattr(command, "commands") and not given:
        return "\n".join([*lines, ""])
    usage = ["distill", *words.split(), *(["[OPTIONS]"] if any(map(_is_option, given)) else [])]
    usage += [_argument(param) for param in given if not _is_option(param)]
    lines += ["", "```", " ".join(usage), "```", ""]
    if given:
        lines += ["| | meaning | default |", "| --- | --- | --- |", *map(_row, given), ""]
    return "\n".join(lines)


def _sentences(text: str) -> list[str]:
    """Paragraphs of help as lines of the page, without the markup that typer shows."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return [_escaped(re.sub(r"\\\[", "[", part)) for part in paragraphs if part]


def _is_option(param: Any) -> bool:
    return param.opts[0].startswith("-")


def _argument(param: Any) -> str:
    name = (param.metavar or param.name.upper()).strip("[]")
    name += "..." if param.nargs == -1 else ""
    return name if param.required else f"[{name}]"


def _row(param: Any) -> str:
    if _is_option(param):
        name = ", ".join([*param.opts, *param.secondary_opts])
        name += "" if getattr(param, "is_flag", False) else f" {_value_of(param)}"
    else:
        name = _argument(param)
    default = "must be given" if param.required else _default(param)
    help_text = " ".join(_sentences(getattr(param, "help", "") or ""))
    return f"| `{_escaped(name)}` | {help_text} | {default} |"


def _value_of(param: Any) -> str:
    """The placeholder of a value: its metavar, else its kind."""
    if param.metavar:
        return str(param.metavar)
    kind = param.type_descriptor.annotation
    kind = next((each for each in get_args(kind) if each is not type(None)), kind)
    return {"int": "N", "float": "X", "Path": "PATH"}.get(getattr(kind, "__name__", ""), "TEXT")


def _default(param: Any) -> str:
    value = param.default
    if value is None or value is False or value in ((), []) or callable(value):
        return ""
    return f"`{_escaped(str(value))}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
