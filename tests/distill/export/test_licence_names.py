"""Names and texts of licences: known ones in every spelling, and nothing taken for what it is not."""

from pathlib import Path

import pytest

from distill.export.licence_names import (
    identifier_of_text,
    identifiers_of,
    slug_of,
    title_of_text,
)

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("apache-2.0", {"apache-2.0"}),
        ("Apache 2.0", {"apache-2.0"}),
        ("Apache License, Version 2.0", {"apache-2.0"}),
        ("The MIT License", {"mit"}),
        ("MIT OR Apache-2.0", {"mit", "apache-2.0"}),
        ("DINOv3 License", {"dinov3-license"}),
        ("dinov3", {"dinov3-license"}),
        ("Creative Commons Attribution-NonCommercial 4.0 International", {"cc-by-nc-4.0"}),
        ("GNU General Public License v3.0", {"gpl-3.0"}),
        ("GPL-3.0-or-later", {"gpl-3.0"}),
        ("ACME Model Licence 1.1", {"acme-model-licence-1.1"}),
        ("other", set()),
        ("Unknown", set()),
        ("see README.md", set()),
        ("https://example.org/licence", set()),
        ("", set()),
    ],
)
def test_identifiers_of__one_for_every_spelling(name: str, expected: set[str]) -> None:
    assert identifiers_of(name) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "# DINOv3 License\n\n*Last updated*\n\n... Apache License, Version 2.0 ...",
            "dinov3-license",
        ),
        ("MIT License\n\nCopyright", "mit"),
        ("Copyright X\n\nPermission is hereby granted, free of charge, to any", "mit"),
        ("Redistribution and use in source\n  and binary forms, ...", "bsd-2-clause"),
        (
            "Redistribution and use in source and binary forms ... Neither the name of X",
            "bsd-3-clause",
        ),
        ("GNU AFFERO GENERAL PUBLIC LICENSE\n   Version 3, 19 November 2007", "agpl-3.0"),
        (
            "GNU LESSER GENERAL PUBLIC LICENSE\nVersion 3\n the GNU General Public License",
            "lgpl-3.0",
        ),
        ("Attribution-NonCommercial 4.0 International\n\n=====", "cc-by-nc-4.0"),
        ("SPDX-License-Identifier: Apache-2.0", "apache-2.0"),
        ("ACME Model Licence\nYou may not ...", ""),
        ("", ""),
    ],
)
def test_identifier_of_text__a_text_names_itself(text: str, expected: str) -> None:
    assert identifier_of_text(text) == expected


def test_identifier_of_text__that_of_the_project() -> None:
    assert identifier_of_text((ROOT / "LICENSE").read_text()) == "apache-2.0"


def test_titles_and_slugs() -> None:
    assert title_of_text("\n# ACME Licence #\nmore") == "ACME Licence"
    assert title_of_text("1234\n---") == ""
    assert slug_of("ACME (Model) Licence 1.1!") == "acme-model-licence-1.1"
