"""Licences of a teacher go with its students, and with theirs; what nobody states stays unknown."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from distill.errors import CheckpointError
from distill.export.licences import (
    Licences,
    Stated,
    Terms,
    front_matter_of,
    licences_in,
    licences_of,
    pass_on,
    write_licences,
)

DINO = "# DINOv3 License\n\nThe terms.\n"
MIT = "MIT License\n\nCopyright somebody\n"
APACHE = "Apache License\nVersion 2.0, January 2004\n"


def teacher(
    folder: Path, files: dict[str, str], card: str = "", config: dict[str, Any] | None = None
) -> Path:
    """The folder of somebody's network, as far as licences go."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    if card:
        (folder / "README.md").write_text(f"---\n{card}\n---\n# a network\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "dinov3_vit", **(config or {})}))
    (folder / "model.safetensors").touch()
    return folder


def student(folder: Path, licences: Licences) -> Path:
    """The folder of a student that was made under licences."""
    folder.mkdir(parents=True)
    write_licences(folder, licences)
    record = {"method": "distillation", "recipe": "r", "licences": licences.to_json()}
    (folder / "distill.json").write_text(json.dumps(record))
    head = "\n".join(f"{key}: {value}" for key, value in licences.front_matter().items())
    (folder / "README.md").write_text(f"---\n{head}\n---\n")
    return folder


FOUND: list[tuple[dict[str, str], str, dict[str, Any], dict[str, str]]] = [
    ({"LICENSE": APACHE}, "", {}, {"license": "apache-2.0"}),
    ({"LICENCE.txt": MIT}, "", {}, {"license": "mit"}),
    ({"COPYING": MIT}, "license: mit", {}, {"license": "mit"}),
    (
        {"LICENSE.md": DINO, "USE_POLICY.md": "be good"},
        "license: other\nlicense_name: dinov3-license\nlicense_link: https://example.org/l",
        {},
        {
            "license": "other",
            "license_name": "dinov3-license",
            "license_link": "https://example.org/l",
        },
    ),
    (
        {"LICENSE": DINO},
        "",
        {},
        {"license": "other", "license_name": "dinov3-license", "license_link": "LICENSE"},
    ),
    (
        {"LICENSE": "ACME Model Licence\nno"},
        "",
        {},
        {"license": "other", "license_name": "acme-model-licence", "license_link": "LICENSE"},
    ),
    (
        {"LICENSE-MIT": MIT, "LICENSE-APACHE": APACHE},
        "license: apache-2.0",
        {},
        {"license": "apache-2.0"},
    ),
    ({"LICENSES/MIT.txt": MIT}, "", {}, {"license": "mit"}),
    ({}, "license: [mit]", {}, {"license": "mit"}),
    ({}, "", {"license": "apache-2.0"}, {"license": "apache-2.0"}),
    ({}, "", {"pretrained_cfg": {"license": "apache-2.0"}}, {"license": "apache-2.0"}),
    (
        {},
        "license: other\nlicense_link: https://example.org/l",
        {},
        {"license": "other", "license_name": "see-link", "license_link": "https://example.org/l"},
    ),
]


@pytest.mark.parametrize(("files", "card", "config", "expected"), FOUND)
def test_licences_of__what_a_folder_states(
    files: dict[str, str],
    card: str,
    config: dict[str, Any],
    expected: dict[str, str],
    tmp_path: Path,
) -> None:
    found = licences_of(teacher(tmp_path / "big", files, card, config), "big")
    assert not found.problems and found.is_known
    assert found.front_matter() == expected
    assert sorted(text.decode() for text in found.texts.values()) == sorted(files.values())


@pytest.mark.parametrize(
    ("files", "card", "stated", "problem"),
    [
        ({}, "", Stated(), "its folder states no licence"),
        ({"NOTICE": "thanks"}, "", Stated(), "its folder states no licence"),
        ({}, "license: unknown", Stated(), "its folder states no licence"),
        ({}, ": [not yaml", Stated(), "its folder states no licence"),
        ({"license_scanner.py": MIT}, "", Stated(), "its folder states no licence"),
        (
            {"LICENSE": DINO},
            "license: apache-2.0",
            Stated(),
            "README.md: apache-2.0; LICENSE: dino",
        ),
        ({"LICENSE": "ACME\n"}, "license: mit", Stated(), "README.md: mit; LICENSE: acme"),
        ({"LICENSE": MIT}, "", Stated("Apache 2.0"), "teacher.licence: apache-2.0; LICENSE: mit"),
        (
            {"LICENSE": DINO},
            "license: mit",
            Stated("cc0-1.0"),
            "teacher.licence: cc0-1.0; README.md: mit; LICENSE: dinov3-license",
        ),
        ({"LICENSE-A": MIT, "LICENSE-B": APACHE}, "", Stated(), "which of them applies"),
    ],
)
def test_licences_of__unknown_or_contradicting_is_one_problem_and_no_licence(
    files: dict[str, str], card: str, stated: Stated, problem: str, tmp_path: Path
) -> None:
    found = licences_of(teacher(tmp_path / "big", files, card), "big", stated)
    assert len(found.problems) == 1 and problem in found.problems[0]
    assert found.front_matter() == {"license": "unknown"} and not found.is_known
    assert "unknown: " in found.terms[0].describe()


def test_licences_of__a_bare_file_states_what_the_key_states(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text(APACHE)
    bare, text = tmp_path / "big.pth", tmp_path / "terms.md"
    bare.touch()
    text.write_text(DINO)
    found = licences_of(bare, "big.pth")
    assert found.problems == [
        "big.pth: a bare file states no licence (LICENSE beside it may be of something else)"
    ]
    assert not found.texts
    found = licences_of(bare, "big.pth", Stated(link="https://example.org/l", file=text))
    assert not found.problems and found.texts == {"LICENSE-terms.md": DINO.encode()}
    assert found.front_matter()["license_name"] == "dinov3-license"
    assert "DINOv3 License (https://example.org/l)" in found.terms[0].describe()
    assert licences_of(bare, "x", Stated("mit")).front_matter() == {"license": "mit"}
    with pytest.raises(CheckpointError, match=r"absent: cannot be read .*a licence must go with"):
        licences_of(bare, "x", Stated(file=tmp_path / "absent"))


def test_licences_of__a_file_of_a_folder_has_the_folders(tmp_path: Path) -> None:
    folder = teacher(tmp_path / "big", {"LICENSE": MIT})
    assert licences_of(folder / "model.safetensors", "big").front_matter() == {"license": "mit"}
    (folder / "distill.json").write_text(json.dumps({"files": {"big-1a2b.pth": {}}}))
    assert licences_of(folder / "big-1a2b.pth", "big").front_matter() == {"license": "mit"}
    assert licences_of(folder / "other.pth", "other").problems


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1"])
def test_licences_of__a_text_in_another_encoding_is_recognised(
    encoding: str, tmp_path: Path
) -> None:
    folder = teacher(tmp_path / "big", {})
    (folder / "LICENSE.txt").write_bytes((DINO + "\u00e9").encode(encoding))
    found = licences_of(folder, "big")
    assert found.terms[0].identifiers == ("dinov3-license",)
    (folder / "LICENSE.txt").write_bytes(b"%PDF\0\1")
    assert licences_of(folder, "big").terms[0].identifiers == ("license.txt",)


def test_licences_of__the_text_is_copied_where_the_cache_has_links(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text(MIT)
    folder = teacher(tmp_path / "big", {})
    (folder / "LICENSE").symlink_to(tmp_path / "blob")
    made = student(tmp_path / "small", licences_of(folder, "big"))
    assert not (made / "LICENSE").is_symlink() and (made / "LICENSE").read_text() == MIT


def test_chain__of_students_of_students_loses_no_licence(tmp_path: Path) -> None:
    first = licences_of(teacher(tmp_path / "big", {"LICENSE": DINO, "NOTICE": "thanks"}), "big")
    middle = student(tmp_path / "middle", first)
    assert licences_in(middle) == first == licences_of(middle, "middle of r")
    (middle / "LICENSE").rename(middle / "kept")
    lost = licences_of(middle, "middle of r")
    assert lost.problems == ["big: LICENSE is no longer in middle"]
    (middle / "kept").rename(middle / "LICENSE")

    heads = teacher(tmp_path / "heads", {"LICENSE": "another\n"})
    second = licences_of(middle, "middle of r", Stated(), heads)
    last = licences_in(student(tmp_path / "last", second))
    assert [each.network for each in last.terms] == ["middle of r", "big"]
    assert sorted(last.texts) == ["LICENSE", "LICENSE-middle-of-r", "NOTICE"]
    assert last.texts["LICENSE"] == DINO.encode()
    assert last.texts["LICENSE-middle-of-r"] == b"another\n"


def test_chain__a_card_that_somebody_changed_contradicts_it(tmp_path: Path) -> None:
    made = student(
        tmp_path / "small", licences_of(teacher(tmp_path / "big", {"LICENSE": DINO}), "b")
    )
    (made / "README.md").write_text("---\nlicense: mit\n---\n")
    (problem,) = licences_of(made, "small").problems
    assert "README.md: mit; its licence files: dinov3-license" in problem


def test_chain__a_teacher_of_ones_own_states_none_and_that_is_no_problem(tmp_path: Path) -> None:
    folder = teacher(tmp_path / "mine", {})
    record = {"method": "pretraining", "recipe": "mine", "recipe_hash": "feed"}
    (folder / "distill.json").write_text(json.dumps(record))
    found = licences_of(folder, "mine")
    assert found == licences_of(None, "mine") == Licences((Terms("mine", is_pretrained=True),))
    assert found.front_matter() == {} and not found.problems
    assert "pretrained from scratch" in found.terms[0].describe()
    (folder / "LICENSE").write_text(MIT)
    assert licences_of(folder, "mine").front_matter() == {"license": "mit"}
    old = {"recipe": "mine", "recipe_hash": "feed", "steps": 3, "data": "1"}  # of 0.1.0
    (folder / "LICENSE").unlink()
    (folder / "distill.json").write_text(json.dumps(old))
    assert licences_of(folder, "mine").terms[0].is_pretrained
    (folder / "distill.json").write_text(json.dumps({**old, "teacher_fingerprint": "1"}))
    assert licences_of(folder, "mine").problems


def test_chain__the_key_settles_what_was_unknown_and_no_contradiction(tmp_path: Path) -> None:
    unknown = student(tmp_path / "a", licences_of(teacher(tmp_path / "big", {}), "big"))
    assert licences_of(unknown, "a of r").problems == ["big: its folder states no licence"]
    found = licences_of(unknown, "a of r", Stated("mit"))
    assert not found.problems and found.front_matter() == {"license": "mit"}
    two = teacher(tmp_path / "two", {"LICENSE": DINO}, "license: mit")
    made = student(tmp_path / "b", licences_of(two, "two"))
    assert licences_of(made, "b of r", Stated("mit")).problems


def test_pass_on__converted_folders_keep_files_and_record(tmp_path: Path) -> None:
    made = student(tmp_path / "a", licences_of(teacher(tmp_path / "big", {"LICENSE": DINO}), "big"))
    (tmp_path / "converted").mkdir()
    passed = pass_on(made, tmp_path / "converted")
    assert licences_in(tmp_path / "converted") == passed == licences_in(made)
    record = json.loads((tmp_path / "converted/distill.json").read_text())
    assert record["method"] == "distillation"
    assert list(pass_on(made, tmp_path / "file.pth").texts) == ["LICENSE"]
    (tmp_path / "plain").mkdir()
    pass_on(teacher(tmp_path / "none", {}), tmp_path / "plain")
    assert not list((tmp_path / "plain").iterdir()), "nothing is known, so nothing is written"


@pytest.mark.parametrize(
    ("line", "name"), [("mit", "mit"), ("other, dinov3-license, https://x.org", "dinov3-license")]
)
def test_licences_of__the_line_of_an_export_of_0_1_0(line: str, name: str, tmp_path: Path) -> None:
    folder = teacher(tmp_path / "big", {})
    (folder / "distill.json").write_text(json.dumps({"licence": line, "export": {}}))
    assert licences_of(folder, "big").terms[0].identifiers == (name,)
    (folder / "distill.json").write_text(json.dumps({"licence": "unknown: check it", "export": {}}))
    assert licences_of(folder, "big").problems


def test_write_licences__files_of_another_teacher_go(tmp_path: Path) -> None:
    made = student(tmp_path / "small", Licences((Terms("a", files=("NOTICE",)),), {"NOTICE": b"a"}))
    (made / "LICENSE-mine").write_text("of the user")
    write_licences(made, Licences((Terms("b", files=("LICENSE",)),), {"LICENSE": b"b"}))
    assert {path.name for path in made.iterdir()} == {
        "LICENSE",
        "LICENSE-mine",
        "README.md",
        "distill.json",
    }


def test_licences_in__a_record_leads_nowhere_else(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    terms = {"network": "x", "files": ["../secret", "..", "model.safetensors", "LICENSE"]}
    (folder / "distill.json").write_text(json.dumps({"licences": [terms, 3, {"network": 1}]}))
    (tmp_path / "secret").write_text("secret")
    (folder / "model.safetensors").touch()
    found = licences_in(folder)
    assert found.texts == {}
    assert found.problems == ["x: LICENSE is no longer in small"]
    write_licences(folder, Licences())
    assert (tmp_path / "secret").is_file() and (folder / "model.safetensors").is_file()


def test_front_matter__of_two_licences_names_both() -> None:
    both = Licences((Terms("a", ("mit",)), Terms("b", ("dinov3-license",), link="https://x.org")))
    head = both.front_matter()
    assert head["license"] == "other" and head["license_name"] == "dinov3-license-and-mit"
    assert re.fullmatch(r"[a-z0-9.-]+", head["license_name"])
    assert both.metadata()["licences"].splitlines()[0] == "a: mit"


@pytest.mark.parametrize("text", ["\ufeff---\r\nlicense: mit\r\n---\r\n", "---\nlicense: mit\n---"])
def test_front_matter_of__marks_and_line_ends(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert front_matter_of(tmp_path / "README.md") == {"license": "mit"}
    assert front_matter_of(tmp_path / "absent") == {}
