"""docker/Dockerfile, read line by line: nothing here builds it, its steps are held to what the project says elsewhere."""

import re
import tomllib
from pathlib import Path

from typer.main import get_command

from distill.cli.app import app

ROOT = Path(__file__).parent.parent
FILE = ROOT / "docker" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "constraints.txt"}
SOURCES |= {"distill", "students", "teacher", "recipes"}
Line = tuple[str, list[str]]


def stages() -> dict[str, list[Line]]:
    """The instructions of each stage by its name, which is ``final`` for the last one."""
    found: dict[str, list[Line]] = {}
    for text in FILE.read_text().splitlines():
        if not text or text.startswith("#"):
            continue
        name, *words = text.split()
        if name == "FROM":
            found[words[2] if words[1:2] == ["AS"] else "final"] = []
        list(found.values())[-1].append((name, words))
    return found


def words_of(lines: list[Line], name: str) -> list[list[str]]:
    return [words for each, words in lines if each == name]


def test_stages__have_one_base_of_a_version_the_project_runs_on() -> None:
    bases = {words_of(lines, "FROM")[0][0] for lines in stages().values()}
    (base,) = bases  # an environment works where the interpreter lies at the same place
    version = re.fullmatch(r"python:(\d\.\d+)-slim-\w+", base)
    assert version is not None
    assert f"Programming Language :: Python :: {version[1]}" in PROJECT["classifiers"]


def test_copies__are_all_that_a_wheel_is_made_of_and_nothing_else() -> None:
    packages, final = stages().values()
    copied = [word for words in words_of(packages, "COPY") for word in words[:-1]]
    assert sorted(copied) == sorted(SOURCES)
    assert all((ROOT / name).exists() for name in copied)
    ignored = FILE.with_name("Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*" and {word[1:] for word in ignored if word[0] == "!"} == SOURCES
    assert words_of(final, "COPY") == [["--from=packages", "/opt/distill", "/opt/distill"]]


def test_packages__are_installed_as_by_make_setup_from_the_usual_index() -> None:
    made = re.search(r"^\$\(READY\):.*?\n\n", (ROOT / "Makefile").read_text(), re.M | re.S)
    assert made is not None
    wanted = re.findall(r"((?:DS_BUILD_OPS=0 )?)\$\(BIN\)/python -m pip install (.*)", made[0])
    editable = {"--editable '.[dev]'": ".", "--quiet ": ""}
    expected = []
    for variables, words in wanted:
        for old, new in editable.items():
            words = words.replace(old, new)
        expected.append(f"{variables}python -m pip install {words}")
    lines = [" ".join(words) for words in words_of(stages()["packages"], "RUN")]
    assert [line for line in lines if "pip install" in line] == expected and len(expected) == 3


def test_user__is_none_that_may_do_everything_and_nothing_runs_after() -> None:
    final = stages()["final"]
    names = [name for name, _ in final]
    (user,) = words_of(final, "USER")[0]
    assert user.isdecimal() and int(user) > 0  # Kubernetes can tell only numbers
    assert "RUN" not in names[names.index("USER") :] and f"--uid {user}" in FILE.read_text()


def test_lines__hold_no_secret_and_fetch_from_nowhere_else() -> None:
    text = FILE.read_text()
    assert not re.search(r"(?i)token|secret|passw|credential|_key\b", text)
    assert not re.search(r"https?://|--(extra-)?index-url|--trusted-host|curl |wget ", text)
    assert not any(words_of(lines, name) for lines in stages().values() for name in ("ADD", "ARG"))


def test_health__is_a_command_of_the_program_that_the_image_starts() -> None:
    final, verbs = stages()["final"], get_command(app).commands  # type: ignore[attr-defined]
    (health,) = words_of(final, "HEALTHCHECK")
    command = " ".join(health[health.index("CMD") + 1 :])
    assert command == '["distill", "doctor"]' and "doctor" in verbs
    assert words_of(final, "ENTRYPOINT") == [['["distill"]']]
    assert PROJECT["scripts"].keys() == {"distill"}
