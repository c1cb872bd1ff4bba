"""Links, commands and snippets of the pages, the site made of them, and the log that the dated figures point to."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distill.screen.snapshot import RunSnapshot
from tests.support import cli_page, readme_pictures
from tests.support.command_lines import (
    blocks,
    named_commands,
    problem_with,
    problem_with_names,
    shown_commands,
    unknown_keys,
)
from tests.support.status import ROW, STATUS

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


def test_log__entries_are_linked_from_a_page_or_name_none() -> None:
    pages = [page.read_text() for page in PAGES if page != LOG]
    unlinked = []
    for heading, text in entries().items():
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        is_linked = any(f"log.md#{anchor})" in page for page in pages)
        unlinked += [] if is_linked or "- Page: none" in text else [heading]
    assert unlinked == []


COMMAND_PAGES = [page for page in PAGES if page.name not in ("cli.md", "CHANGELOG.md")]


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.name)
def test_commands__of_a_block_can_be_typed(page: Path) -> None:
    problems = [problem_with(words) for words in shown_commands(page.read_text())]
    assert [text for text in problems if text] == []


@pytest.mark.parametrize(
    "page", [page for page in COMMAND_PAGES if page != LOG], ids=lambda page: page.name
)
def test_commands__within_a_text_have_these_verbs_and_options(page: Path) -> None:
    problems = [problem_with_names(words) for words in named_commands(page.read_text())]
    assert [text for text in problems if text] == []


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.name)
def test_snippets__have_keys_that_exist_and_compile(page: Path) -> None:
    text = page.read_text()
    assert [key for snippet in blocks(text, "yaml") for key in unknown_keys(snippet)] == []
    for snippet in blocks(text, "python"):
        compile(snippet, page.name, "exec")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("distill trian quickstart", "no command trian"),
        ("distill train quickstart --gpu 2", "No such option"),
        ("distill train quickstart schedule.stepz=2", "schedule.stepz"),
        ("distill train quickstart teacher:stages.0.stepz=2", "stepz"),
        ("distill check my.yaml schedule.stepz=2", "schedule.stepz"),
        ("distill bench quickstart --slep 1", "No such option"),
        ("distill plan quickstart --ranks many", "integer"),
        ("torchrun -m distill train quickstart --gpu 2", "No such option"),
        ("make tset", "no target"),
        ("python -m tests.chaoss", "no module"),
        ("pytest tests/test_nothing.py", "no file"),
        ("pip install distill-family[nothing]", "no extra"),
    ],
)
def test_problem_with__finds_what_cannot_be_typed(command: str, words: str) -> None:
    assert words in problem_with(command.split())


def test_blocks__are_found_and_read() -> None:
    page = "```\ndistill runs   # what is there\n$ output\ndistill check a.yaml && make test\n```\n"
    assert shown_commands(page) == [
        ["distill", "runs"],
        ["distill", "check", "a.yaml"],
        ["make", "test"],
    ]
    assert "no nothing" in problem_with_names(["data", "nothing"])
    assert "--nothing" in problem_with_names(["train", "RECIPE", "--nothing"])
    assert unknown_keys("schedule: {stepz: 1}\nstudents: [{arch: vit, hedas: 1}]") == [
        "schedule.stepz",
        "students.hedas",
    ]


def test_questions__are_25_and_each_names_another_public_thread() -> None:
    page = (ROOT / "docs" / "faq.md").read_text()
    titles = re.findall(r"^### (\d+)\. (.+)$", page, re.MULTILINE)
    assert [int(index) for index, _ in titles] == list(range(1, 26))
    answers = re.split(r"^### .+$", page, flags=re.MULTILINE)[1:]
    thread = r"^\[([\w.-]+/[\w.-]+) #(\d+)\]\(https://github\.com/\1/issues/\2\)\.$"
    threads = [re.findall(thread, answer, re.MULTILINE) for answer in answers]
    assert all(len(found) == 1 for found in threads)
    assert len({found[0] for found in threads}) == 25


def test_command_line__page_is_what_the_commands_print() -> None:
    assert cli_page.PAGE.read_text() == cli_page.page(), "python -m tests.support.cli_page"


def test_index__leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w./-]+\.md)", (ROOT / "docs" / "index.md").read_text()))
    pages = {page.name if page.parent != ROOT else f"../{page.name}" for page in PAGES}
    assert linked == pages - {"index.md"}


def test_site__is_built_without_a_warning(tmp_path: Path) -> None:
    """What ``make docs`` does, of a copy of the pages: Sphinx finds more than the links above."""
    for page in PAGES:
        (tmp_path / page.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(page, tmp_path / page.relative_to(ROOT))
    hidden = shutil.ignore_patterns("_build")
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=hidden, dirs_exist_ok=True)
    shutil.copy(ROOT / "LICENSE", tmp_path)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-c",
        "docs",
        ".",
        "site",
    ]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "docs" / "glossary.html").read_text()
    assert "look-ahead" in page, "the table of architecture.md is on the page of the site"
    page = (tmp_path / "site" / "docs" / "cli.html").read_text()
    assert "unless --allow-code is given" in page, "no dashes in place of hyphens"
    assert 'url=docs/index.html"' in (tmp_path / "site" / "index.html").read_text()


def test_readme__shows_three_small_pictures() -> None:
    shown = re.findall(r"^!\[.+\]\((.+)\)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert shown == ["docs/family.png", "docs/panel.svg", "docs/timeline.png"]
    assert all((ROOT / name).stat().st_size < 200_000 for name in shown)


def test_panel__of_the_readme_loads_nothing_from_elsewhere() -> None:
    rows = {name: [ROW] for name in STATUS.networks}
    made = readme_pictures.panel(RunSnapshot("mine", STATUS, rows, None, STATUS.updated_unix))
    for text in (made, (ROOT / "docs" / "panel.svg").read_text()):
        assert "@font-face" not in text and "url(http" not in text and "href=" not in text
    assert "distill&#160;train&#160;mine" in made or "distill train mine" in made


def test_pictures__of_the_readme_can_be_made_again(tmp_path: Path) -> None:
    report = json.loads((ROOT / "docs" / "bench" / "family_vit_sleep_8ranks.json").read_text())
    readme_pictures.timeline(report, tmp_path / "timeline.png")
    readme_pictures.family((ROOT / "docs" / "quickstart.md").read_text(), tmp_path / "family.png")
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 2
