"""The files in which a folder of weights holds its licences: LICENSE, NOTICE, COPYING, USE_POLICY and the like."""

import codecs
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from distill.errors import CheckpointError
from distill.export.licence_names import slug_of, title_of_text

WORDS = (
    r"licen[sc]es?\d*|notices?|copying|copyright|unlicense|eula|(acceptable[_-]?)?use[_-]?policy"
)
IS_LICENCE = re.compile(rf"(^|[._ -])({WORDS})([._ -]|$)", re.IGNORECASE)
IS_TERMS = re.compile(r"^(?!.*third).*(licen[sc]e|copying|eula)", re.IGNORECASE)  # no notice
NO_TEXTS = frozenset(
    re.findall(
        r"\S+", ".py .json .yaml .yml .toml .safetensors .pth .pt .bin .onnx .c .h .js .png .jpg"
    )
)
FOLDERS = ("LICENSES", "licenses", "LICENCES", "licences")


def licence_files(folder: Path) -> list[Path]:
    """The files of a folder, and of its ``LICENSES``, that are licences, notices or policies by their names."""
    inside = [path for name in FOLDERS for path in _entries(folder / name)]
    named = [path for path in _entries(folder) if IS_LICENCE.search(path.name)]
    return [path for path in (*named, *inside) if path.suffix.lower() not in NO_TEXTS]


def title_of(text: bytes) -> str:
    """The name that a licence's text gives itself; empty for binary files."""
    return title_of_text(decoded(text))


def decoded(text: bytes) -> str:
    """Returns the text of a licence file, in UTF-8 or, with its mark, UTF-16; empty for a binary file such as a PDF."""
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return text.decode("utf-16", "replace")
    return "" if b"\0" in text else text.decode("utf-8-sig", "replace")


def licence_name(name: str) -> str:
    """Returns a name of letters, digits and plain marks, by which a file is known as a licence."""
    safe = re.sub(r"[^\w.+ -]", "_", name.encode("utf-8", "replace").decode())
    return safe if IS_LICENCE.search(safe) else f"LICENSE-{safe}"


def _entries(folder: Path) -> list[Path]:
    found: dict[tuple[int, int], Path] = {}  # one folder under two names, where case does not count
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and path.name[0] != ".":
            facts = path.stat()
            found.setdefault((facts.st_dev, facts.st_ino), path)
    return list(found.values())


def read_licence(path: Path) -> bytes:
    """Reads a licence file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}), and a licence must go with what is made under it",
            fix="Make the file readable, or name another in teacher.licence.file.",
        ) from error


def read_licence_files(folder: Path, carried: Collection[str]) -> dict[str, bytes]:
    """Contents of the licence files that are not in ``carried``, by the name that they get."""
    found: dict[str, bytes] = {}
    for path in licence_files(folder):
        if path.parent == folder and path.name in carried:
            continue
        found = merged(found, {licence_name(path.name): read_licence(path)}, folder.name)[0]
    return found


def merged(
    texts: Mapping[str, bytes], more: Mapping[str, bytes], owner: str
) -> tuple[dict[str, bytes], list[str]]:
    """Both, and the names that the second ones have now: none is lost, equal ones are held once, others renamed."""
    both, names = dict(texts), []
    for name, text in more.items():
        stem, dot, suffix = name.rpartition(".")
        stem, suffix = (stem, f".{suffix}") if dot and stem else (name, "")
        tried = [name, f"{stem}-{slug_of(owner)}{suffix}"]
        tried += [f"{stem}-{slug_of(owner)}-{count}{suffix}" for count in range(2, len(both) + 3)]
        taken = {each.lower(): each for each in both}
        for candidate in tried:
            held = taken.get(candidate.lower())
            if held is None or both[held] == text:
                both[held or candidate] = text
                names.append(held or candidate)
                break
    return both, names
