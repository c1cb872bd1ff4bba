"""What the text of a source stands for."""

import os
from pathlib import Path

import pytest

from distill.errors import DataError
from distill.listing.passed_over import PassedOver
from distill.listing.source_paths import expand, expand_braces, source_path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names(text: Path | str, folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in expand(str(text)).paths]


def test_source_path__home_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SET", "web")
    monkeypatch.chdir(tmp_path)
    assert (
        source_path("~/a") == source_path("$HOME/a") == source_path("${HOME}/a") == tmp_path / "a"
    )
    assert source_path("$SET/a") == tmp_path / "web/a"
    assert source_path("~nobody-of-this-name/a") == tmp_path / "~nobody-of-this-name/a"
    touch(tmp_path, "$SET/a", "~/b")
    assert source_path("$SET/a") == tmp_path / "$SET/a"  # what is there is meant
    assert source_path("~/b") == tmp_path / "~/b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s-{000..003}.tar", ["s-000.tar", "s-001.tar", "s-002.tar", "s-003.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{0..6..3}", ["0", "3", "6"]),
        ("{a..c}", ["a", "b", "c"]),
        ("{cat,dog}/{1,2}", ["cat/1", "cat/2", "dog/1", "dog/2"]),
        ("{a,{1..2}}", ["a", "a", "1", "2"]),
        ("{a}", ["{a}"]),
        ("{1..x}", ["{1..x}"]),
    ],
)
def test_expand_braces__as_a_shell_does(text: str, expected: list[str]) -> None:
    assert sorted(expand_braces(text)) == sorted(expected)


def test_expand__too_many(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="stands for more than 1,000,000 paths"):
        expand(f"{tmp_path}/{{0..99999999}}.tar")


def test_expand__patterns(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg", "3.png", ".hidden.jpg", "._1.jpg", "a/4.jpg", "a/b/5.jpg")
    touch(tmp_path, "@eaDir/6.jpg", "[x]/7.jpg")
    assert names(tmp_path / "*.jpg", tmp_path) == ["1.jpg", "2.jpg"]
    assert names(tmp_path / "[12].jpg", tmp_path) == ["1.jpg", "2.jpg"]
    assert names(tmp_path / "*/*.jpg", tmp_path) == ["[x]/7.jpg", "a/4.jpg"]
    deep = ["1.jpg", "2.jpg", "[x]/7.jpg", "a/4.jpg", "a/b/5.jpg"]
    assert names(tmp_path / "**/*.jpg", tmp_path) == deep
    assert names(tmp_path / "*.{jpg,png}", tmp_path) == ["1.jpg", "2.jpg", "3.png"]
    assert names(tmp_path / "[x]/*.jpg", tmp_path) == ["[x]/7.jpg"]
    assert names(tmp_path / "[x]", tmp_path) == ["[x]"]
    assert names(tmp_path / "a/**", tmp_path) == ["a"]
    assert names(tmp_path / "**/b", tmp_path) == ["a/b"]
    (tmp_path / "again").symlink_to("a")
    passed = PassedOver()
    assert len(expand(f"{tmp_path}/**/{{1,4,8}}*.{{jpg,gif}}", passed).paths) == 2
    assert passed.reasons == {"link to a folder that is read already": 1}  # once, not for each
    assert len(passed.remarks) == 4 and "8*.jpg (of " in passed.remarks[2]
    (tmp_path / "again").unlink()
    passed = PassedOver()
    expand(str(tmp_path / "*.jpg"), passed)
    assert passed.reasons == {"hidden": 1, "system file ._*": 1}  # the rest was not asked for


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("none", "none is not there"),
        ("*.webp", r"\*.webp matches nothing"),
        ("{1,4}.jpg", r"4.jpg \(of .*\{1,4\}.jpg\) is not there"),
        ("none/*.jpg", "matches nothing"),
        ("$NO_SUCH_NAME/x", r"NO_SUCH_NAME/x is not there \(NO_SUCH_NAME is not set\)"),
    ],
)
def test_expand__what_is_missing(text: str, told: str, tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg")
    with pytest.raises(DataError, match=told):
        expand(os.path.join(tmp_path, text))  # noqa: PTH118  # keeps the text
