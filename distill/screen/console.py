"""All that is printed goes through here: a control character is shown, not sent to the terminal.

A file name, an event or a message of a run folder may hold some; a terminal that gets them moves its
cursor, changes its title or writes the clipboard.

    make_console     tables, lines and panels: text is escaped before it is laid out, and is no markup
    escaped_output   around the command: standard output and error escape what anything else writes
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

# C0 without tab and newline, DEL and C1; line and paragraph separators and what turns the direction
# of text round; halves of surrogates, which stand for the bytes of a name that is no UTF-8
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
COLOUR = re.compile("(\x1b\\[[0-9;]*m)")


def printable(text: str) -> str:
    """Returns ``text`` with every control character but tab and newline written out in hex."""
    return CONTROL.sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    number = ord(match.group())
    number -= 0xDC00 if 0xDC80 <= number <= 0xDCFF else 0  # a byte of a name that is no UTF-8
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


class EscapingConsole(Console):
    """A console whose only control characters are those that rich makes for colours and the cursor."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Escapes a string before it is measured and laid out."""
        return super().render_str(printable(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Escapes a text before it is laid out, and whatever is left in a segment."""
        if isinstance(renderable, Text) and CONTROL.search(renderable.plain):
            renderable = renderable.blank_copy(printable(renderable.plain))
        for segment in super().render(renderable, options):
            if segment.control or not CONTROL.search(segment.text):
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def make_console(*, to_stderr: bool = False, **options: Any) -> Console:
    """Returns a console on standard output or error; ``options`` are those of rich's."""
    stream = sys.stderr if to_stderr else sys.stdout
    options = {"file": getattr(stream, "unescaped", stream), **options}
    return EscapingConsole(markup=False, emoji=False, highlight=False, **options)


class EscapedStream:
    """A text stream that escapes what is written to it; ``keeps_colours`` for the help of commands, which typer writes."""

    def __init__(self, unescaped: Any, *, keeps_colours: bool) -> None:
        self.unescaped, self._keeps_colours = unescaped, keeps_colours

    def write(self, text: str) -> int:
        """Writes the text escaped."""
        parts = COLOUR.split(text) if self._keeps_colours else [text]
        self.unescaped.write("".join(p if i % 2 else printable(p) for i, p in enumerate(parts)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes each escaped."""
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        """Returns whether colours may be written."""
        return self._keeps_colours and self.unescaped.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


@contextmanager
def escaped_output() -> Iterator[None]:
    """While inside, nothing in this process sends control characters to a terminal, except consoles of ``make_console``."""
    out, err = (
        cast(TextIO, EscapedStream(stream, keeps_colours=stream is sys.stdout))
        for stream in (sys.stdout, sys.stderr)
    )
    with redirect_stdout(out), redirect_stderr(err):
        yield
