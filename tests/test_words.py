"""Retired words stay out of names, docstrings, comments, messages, keys and pages; docs/architecture.md is the glossary.

Two kinds. A retired word is found everywhere: as a part of a name (``told_unix``), in a string (messages, metric
names, keys of JSON), in a docstring, in a comment and on a page. A word with several meanings is found as a
complete name only, because in prose it is ordinary English: ``place`` for the location of an image.

Three more are looked at where they stand: ``number`` is never a position in a sequence (``index``), only what
comes from random numbers is drawn (pictures are plotted or rendered), and a public class has one name to itself.

What this cannot see: whether a sentence is clear, and a private word that is in no list. Tests may use any word.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for top in ("distill", "students", "teacher") for path in (ROOT / top).rglob("*.py")
)
DATED = {"log.md", "upgrading.md"}  # quote names and messages of earlier versions
PAGES = [
    ROOT / "README.md",
    *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name not in DATED),
]

RETIRED = frozenset(
    [
        "asked",
        "assigner",
        "ballot",
        "ballots",
        "census",
        "lesson",
        "lessons",
        "nobody",
        "own",
        "proof",
        "proofs",
        "prove",
        "proves",
        "proved",
        "pulse",
        "pupil",
        "pupils",
        "refuted",
        "said",
        "says",
        "seen",
        "seer",
        "spoken",
        "standardiser",
        "standardizer",
        "taught",
        "tell",
        "tells",
        "timetable",
        "told",
        "trainee",
        "trainees",
        "unheard",
        "verdict",
        "verdicts",
        "whoever",
        "whole",
        "wholly",
        "wish",
        "wishes",
        "witnessed",
    ]
)
SEVERAL_MEANINGS = frozenset(
    [
        "Fault",
        "Kept",
        "KeptRows",
        "Moment",
        "Needs",
        "Place",
        "colours",
        "kept",
        "keeping",
        "needs",
        "place",
        "places",
        "scene",
        "sheet",
        "site",
    ]
)
PRIVATE = frozenset(
    [
        "Asked",
        "Assigner",
        "Assignment",
        "Assignments",
        "Ballot",
        "Isolation",
        "Keeping",
        "LessonBatch",
        "Pulse",
        "Pupil",
        "Scene",
        "Sign",
        "Site",
        "Standardiser",
        "TargetMaker",
        "Timetable",
        "Trainee",
        "TraineeTraits",
        "Verdict",
        "Wishes",
        "_Guard",
        "_Order",
        "_Rest",
        "_Unheard",
        "_Verdict",
        "_cause",
        "_follow",
        "_judge",
        "_witnessed",
        "arrange",
        "class_rows",
        "conclude",
        "filling",
        "go_back",
        "hear",
        "is_over",
        "lesson_for",
        "patch_rows",
        "still_s",
        "supply",
    ]
)

# Where functions may draw: from random numbers.
DRAWING = (
    "distill/data/",
    "distill/train/masking.py",
    "distill/train/phase.py",
    "distill/train/loop.py",
)
PICTURES = {"distill/data/contact_sheet.py"}

# (file, word): why it stays.
ALLOWED = {
    ("distill/engine/forkserver.py", "site"): "the module of the standard library",
    (
        "distill/data/sampler.py",
        "places",
    ): "names a hash: another text would shuffle every run anew",
}


def words_of(text: str) -> set[str]:
    """Lower-case words; ``told_unix`` and ``ToldUnix`` both hold ``told``."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)}


def names_in(source: str) -> set[str]:
    """Every name that is defined or used: classes, functions, arguments, attributes, variables, keywords."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and node.attr != "tell":  # of a file
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
        elif isinstance(node, ast.alias):
            found |= set(node.name.split(".")) | {node.asname or ""}
    return found


def texts_in(source: str) -> list[str]:
    """Strings (docstrings, messages, keys) and comments."""
    kinds = tokenize.STRING, tokenize.COMMENT
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type in kinds]


def positions_called_number(source: str) -> int:
    """How often ``number`` runs over a sequence or picks an item of one."""
    count = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.For | ast.comprehension):
            names = [name for name in ast.walk(node.target) if isinstance(name, ast.Name)]
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name):
            names = [node.slice]
        else:
            names = []
        count += sum(name.id == "number" for name in names)
    return count


def functions_that_draw(source: str) -> set[str]:
    """Names of functions that say ``draw``."""
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef))
    return {function.name for function in functions if "draw" in words_of(function.name)}


def problems_of(source: str) -> set[str]:
    """Retired words and names with several meanings in a Python file."""
    names = names_in(source)
    found = names & (SEVERAL_MEANINGS | PRIVATE)
    for text in (*names, *texts_in(source)):
        found |= words_of(text) & RETIRED
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source__uses_the_words_of_the_field(path: Path) -> None:
    file = str(path.relative_to(ROOT))
    allowed = {word for name, word in ALLOWED if name == file}
    assert problems_of(path.read_text(encoding="utf-8")) <= allowed


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source__numbers_count_and_only_random_numbers_are_drawn(path: Path) -> None:
    source, file = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    assert positions_called_number(source) == 0
    if file in PICTURES or not file.startswith(DRAWING):
        assert not functions_that_draw(source)


def test_classes__have_one_meaning_each() -> None:
    """A public class name that two modules define is one that a reader takes for the other."""
    defined: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                defined.setdefault(node.name, []).append(path.stem)
    assert {name: files for name, files in defined.items() if len(files) > 1} == {}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page__uses_the_words_of_the_field(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"\btest_\w+", "", text)  # names of tests may hold any word
    text = text.replace("own_pictures", "")  # a recipe, by the name that users know
    assert not words_of(text) & RETIRED
    assert not set(re.findall(r"\w+", text)) & {name for name in PRIVATE if not name.islower()}


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("def f(told_unix): ...", "told"),
        ("class PupilState: ...", "pupil"),
        ("x.place = 1", "place"),
        ("f(own=1)", "own"),
        ('"""What it says."""', "says"),
        ('raise ValueError(f"{x} is not whole")', "whole"),
        ('{"lesson": 1}', "lesson"),
        ("x = 1  # nobody waits", "nobody"),
    ],
)
def test_problems_of__finds_a_word_wherever_it_stands(source: str, word: str) -> None:
    assert problems_of(source) == {word}


def test_positions_called_number__counts_loops_and_subscripts() -> None:
    assert positions_called_number("for number, x in y: ...\nz[number]\nnumber = 1") == 2


def test_allowed__is_still_there() -> None:
    for file, word in ALLOWED:
        assert word in (ROOT / file).read_text(encoding="utf-8")
