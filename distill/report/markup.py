"""Elements of a page. Text is escaped where it becomes HTML, here and nowhere else.

A string is always text: only what ``element`` made is markup. Control characters are written out, so that
a name that is no UTF-8 does not end the page.
"""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distill.screen.console import printable

VOID = frozenset({"img", "meta", "br"})  # elements without an end


@dataclass(frozen=True)
class Html:
    """Markup that is escaped already."""

    text: str


Content = Html | str | int | float | None


def escaped(value: Content) -> str:
    """Returns markup as it is, and anything else as text that is no markup."""
    if isinstance(value, Html):
        return value.text
    return "" if value is None else html.escape(printable(str(value)), quote=True)


def element(tag: str, *children: Content, **attributes: Content) -> Html:
    """Returns an element; ``class_`` is its class and ``data_x`` its attribute ``data-x``."""
    words = [
        f'{name.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for name, value in attributes.items()
        if value is not None
    ]
    opening = f"<{' '.join([tag, *words])}>"
    if tag in VOID:
        return Html(opening)
    return Html(f"{opening}{''.join(map(escaped, children))}</{tag}>")


def joined(parts: Iterable[Html]) -> Html:
    """Returns elements one after the other."""
    return Html("\n".join(part.text for part in parts))


def table(headings: Sequence[str], rows: Iterable[Sequence[Content]]) -> Html:
    """Returns a table; all columns but the first are numbers, to the right."""
    head = element("tr", *(element("th", heading, scope="col") for heading in headings))
    body = [
        element("tr", *(element("th" if at == 0 else "td", cell) for at, cell in enumerate(row)))
        for row in rows
    ]
    parts = element("thead", head), element("tbody", *body)
    return element("div", element("table", *parts), class_="wide")


def facts(pairs: Iterable[tuple[str, Content]]) -> Html:
    """Returns a list of names and values."""
    return element("dl", *(Html(element("dt", n).text + element("dd", v).text) for n, v in pairs))


def note(text: str) -> Html:
    """Returns a line in small print."""
    return element("p", text, class_="note")
