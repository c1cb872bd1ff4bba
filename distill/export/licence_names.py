"""Which licence a name or a text is, as the identifiers of Hugging Face's model cards.

A name is written in many ways (``Apache 2.0``, ``Apache License, Version 2.0``); a text names itself. What is
not known here stays what it is: nothing is ever taken for a licence that it does not name.
"""

import re

UNKNOWN, OTHER = (
    "unknown",
    "other",
)  # what Hugging Face calls none that is known, and one not in its list
IDENTIFIERS = frozenset(
    re.findall(
        r"\S+",
        """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
    ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 gemma
    """,
    )
)
NO_NAMES = frozenset({"", UNKNOWN, OTHER, "none", "na", "n-a"})
HEAD = 4000  # characters of a text in which it names itself
# What texts hold, and names in full; of several that match, the one that comes first in the text is meant
TITLES = (
    (r"dinov3[ _-]licen[sc]e", "dinov3-license"),
    (r"apache licen[sc]e,? \(?v(ersion)?\.? ?2(\.0)?|apache licen[sc]e 2(\.0)?", "apache-2.0"),
    (r"\bmit licen[sc]e|permission is hereby granted, free of charge", "mit"),
    (r"gnu affero general public licen[sc]e,? (version |v)?3", "agpl-3.0"),
    (r"gnu lesser general public licen[sc]e,? (version |v)?3", "lgpl-3.0"),
    (r"gnu lesser general public licen[sc]e,? (version |v)?2\.1", "lgpl-2.1"),
    (r"gnu general public licen[sc]e,? (version |v)?3", "gpl-3.0"),
    (r"gnu general public licen[sc]e,? (version |v)?2", "gpl-2.0"),
    (r"mozilla public licen[sc]e,? (version |v)?2", "mpl-2.0"),
    (r"attribution-noncommercial-sharealike 4\.0", "cc-by-nc-sa-4.0"),
    (r"attribution-noncommercial-noderiv\w+ 4\.0", "cc-by-nc-nd-4.0"),
    (r"attribution-noncommercial 4\.0", "cc-by-nc-4.0"),
    (r"attribution-sharealike 4\.0", "cc-by-sa-4.0"),
    (r"attribution-noderiv\w+ 4\.0", "cc-by-nd-4.0"),
    (r"attribution 4\.0", "cc-by-4.0"),
    (r"cc0 1\.0", "cc0-1.0"),
    (r"creativeml open ?rail-?m", "creativeml-openrail-m"),
    (r"free and unencumbered software", "unlicense"),
    (r"permission to use, copy, modify, and(/or)? distribute this software", "isc"),
    (r"redistribution and use in source and binary forms(?=.*neither the name)", "bsd-3-clause"),
    (r"redistribution and use in source and binary forms", "bsd-2-clause"),
    (r"fair noncommercial research licen[sc]e", "fair-noncommercial-research-license"),
)
RECOGNISED = frozenset(name for _, name in TITLES)


def identifiers_of(name: str) -> frozenset[str]:
    """Returns the identifiers of a name, several for ``MIT OR Apache-2.0``; a name that is not known becomes a slug.

    ``unknown``, ``other`` and names that only refer to somewhere else name no licence: the set is empty.
    """
    found = set()
    for part in re.split(r"\s+(?:and|or|with|/)\s+|\s*[|;]\s*", name, flags=re.IGNORECASE):
        slug = slug_of(part)
        if slug in NO_NAMES or slug.startswith("see-") or "://" in part:
            continue
        found.add(_known(part, slug))
    return frozenset(found)


def identifier_of_text(text: str) -> str:
    """Returns the identifier of a licence's text; empty for one that is not known."""
    stated = re.search(r"SPDX-License-Identifier:\s*([\w.+-]+)", text)
    if stated is not None:
        return next(iter(identifiers_of(stated[1])), "")
    head = re.sub(r"[\s*#_<>]+", " ", text[:HEAD].replace("_", "-")).lower()
    matches = [
        (match.start(), order, identifier)
        for order, (pattern, identifier) in enumerate(TITLES)
        if (match := re.search(pattern, head, re.DOTALL))
    ]
    return min(matches)[2] if matches else ""


def title_of_text(text: str) -> str:
    """Returns the first line of a text that has letters, without marks, at most 60 characters."""
    lines = (line.strip(" \t#*=-_<>!") for line in text.splitlines())
    return next((line[:60].strip() for line in lines if any(map(str.isalpha, line))), "")


def slug_of(name: str) -> str:
    """Returns a name in lower case, with hyphens for everything but letters, digits and dots."""
    return re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-.")


def _known(part: str, slug: str) -> str:
    """The identifier of one name, or its slug where it is none."""
    plain = _squeezed(slug)
    for identifier in (*IDENTIFIERS, *RECOGNISED):
        if plain in {_squeezed(identifier), _squeezed(identifier.removesuffix(".0"))}:
            return identifier
    return identifier_of_text(part) or slug


def _squeezed(slug: str) -> str:
    """Without words and marks in which two spellings of one licence differ."""
    words = re.sub(r"-(only|or-later)$|licen[sc]es?|version|software|\bthe\b|v(?=\d)", "", slug)
    return re.sub(r"[^a-z0-9+]", "", words)
