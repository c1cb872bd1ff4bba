"""Links of the pages, and the log of experiments that the dated figures point to."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LOG = ROOT / "docs" / "log.md"
DATE = r"20\d\d-\d\d-\d\d"


def prose(path: Path) -> str:
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What hosts of repositories make of the headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def entries() -> dict[str, str]:
    """Heading to text of each entry of the log, in the order of the page."""
    parts = re.split(r"^## (.+)$", LOG.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links__lead_to_a_file_and_a_heading(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        name, _, heading = target.partition("#")
        if name.startswith("http"):
            continue
        path = page.parent / name if name else page
        if not path.exists() or (heading and heading not in anchors(path)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in (LOG, ROOT / "CHANGELOG.md")],
    ids=lambda p: p.name,
)
def test_dates__of_figures_are_links_to_the_log(page: Path) -> None:
    linked = re.compile(rf"\[({DATE})\]\((?:docs/)?log\.md#\1-[\w-]+\)")
    assert re.findall(DATE, linked.sub("", prose(page))) == []


def test_log__is_newest_first_and_every_entry_is_whole() -> None:
    dates = [re.match(rf"{DATE}(?=: )", heading) for heading in entries()]
    days = [found[0] for found in dates if found]
    assert len(days) == len(dates)
    assert days == sorted(days, reverse=True)
    for heading, text in entries().items():
        labels = re.findall(r"^- (\w+)", text, re.MULTILINE)
        assert {"Machine", "Command", "Result", "Page"} <= set(labels), heading


def test_log__holds_what_led_to_nothing() -> None:
    assert any("Result, **negative**:" in text for text in entries().values())
