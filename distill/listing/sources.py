"""What a source holds: every image of a folder tree, of WebDataset tar shards, of a list of paths, of Parquet files.

    folder            images below it; or shards, or Parquet files, when it holds no images
    NAME.tar          one shard
    NAME.txt          a path per line, absolute or relative to the list's folder
    NAME.parquet      a column of images
    FOLDER/*.tar      several of these, or images, by a pattern (``distill.listing.source_paths``)

Labels: the folder of a path that names its class; the ``.cls`` member of a shard's sample, or, where a source
has none, the folder of its name; the column ``label``. Only names and headers are read here. What is neither
listed nor an error is counted (``distill.listing.passed_over``).
"""

import codecs
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill.errors import DataError
from distill.listing.labels import class_depth, folders_of, held_out_files, held_out_folders
from distill.listing.locations import Kind, Location
from distill.listing.parquet import list_rows
from distill.listing.passed_over import PassedOver, reason_of, suffix_reason
from distill.listing.source_paths import Expanded, expand, replace_variables
from distill.listing.storage import Storage
from distill.listing.tar import list_members, suffix_of
from distill.listing.walk import walk

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib"})
LIST_SUFFIXES = frozenset({".txt", ".lst"})
COMMENT = re.compile(r"\s#")


@dataclass(frozen=True)
class Found:
    """One image of a source; ``label`` is empty where it has none; ``is_held_out``: its folder holds it out."""

    location: Location
    label: str
    is_held_out: bool = False


Lister = Callable[[Path], Iterable[Found]]
"""Takes a file or folder to its images, in an order that depends on names only; bytes are read later, at each ``location``."""


def list_source(
    source: Path,
    lister: Lister | None = None,
    *,
    passed_over: PassedOver | None = None,
    label_depth: int | None = None,
) -> list[Found]:
    """Every image of a source, in an order that depends on names only.

    Args:
        source: a file, a folder, or a pattern.
        lister: lists it; None where kind and suffix decide.
        passed_over: gets the counts of what is not listed.
        label_depth: which folder names the class, 1 for the first, 0 for none; None as ``class_depth`` finds.

    Raises:
        DataError: it is missing, is of no kind known here, holds no image, or images beside shards.
    """
    passed = PassedOver()
    expanded = expand(str(source), passed)
    try:
        if lister is not None:
            found = [each for path in expanded.paths for each in lister(path)]
        else:
            found = _list(source, expanded, passed, label_depth)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.sources: {source}: {error}", fix="Repair or remove the file."
        ) from error
    if not found:
        over = f" ({passed.describe()} passed over)" if passed.reasons else ""
        raise DataError(
            f"data.sources: {source} holds no images{over}",
            fix=f"Put images ({', '.join(sorted(SUFFIXES))}) into it or its folders.",
        )
    if passed_over is not None:
        held_out = [each.location for each in found if each.is_held_out]
        if held_out:
            passed.remarks.append(
                f"{len(held_out):,} of {len(found):,} images lie in val or test ({held_out[0]}, ...): held out, unless data.held_out is 0"
            )
        passed_over.add(passed)
    return found


def _list(
    source: Path, expanded: Expanded, passed: PassedOver, label_depth: int | None
) -> list[Found]:
    """Images of all paths of a source. Folders of a pattern have separate classes."""
    images: list[str] = []
    containers: list[str] = []
    found: list[Found] = []
    storage = Storage()
    for path in expanded.paths:
        suffix = suffix_of(path.name)
        base = expanded.base if expanded.is_pattern else path.parent
        if storage.read(str(path), path.is_dir):
            found += _list_folder(path, passed, label_depth)
        elif suffix in LIST_SUFFIXES:
            found += _list_lines(path, passed)
        elif suffix in CONTAINERS:
            containers.append(os.path.relpath(path, base))
        elif suffix in SUFFIXES:
            images.append(os.path.relpath(path, base))
        elif expanded.is_pattern:
            passed.reasons[suffix_reason(suffix)] += 1
        else:
            raise DataError(
                f"data.sources: {source} is no source of images",
                fix="Give a folder, .tar shards, a .txt list of paths, a .parquet file or a pattern of these.",
            )
    root = expanded.base if expanded.is_pattern else expanded.base.parent
    found += _list_files(str(root), images, label_depth)
    found += _list_containers(root, containers, passed, label_depth)
    if len({each.location.kind is Kind.FILE for each in found}) > 1:
        names = [str(e.location) for e in found if e.location.kind is Kind.FILE]
        shards = sorted({e.location.container for e in found if e.location.kind is not Kind.FILE})
        raise _mixture(source, expanded.base, names, shards)
    return found


def _mixture(
    source: Path, folder: Path, images: Sequence[str], containers: Sequence[str]
) -> DataError:
    """The refusal of images beside shards or tables: it is not known which of them are meant."""
    ways = []
    for names in (containers, images):
        suffixes = sorted({Path(name).suffix[1:] for name in names})
        ends = suffixes[0] if len(suffixes) == 1 else f"{{{','.join(suffixes)}}}"
        ways.append(f'"{folder}/**/*.{ends}"')
    return DataError(
        f"data.sources: {source} holds both images ({len(images):,}, such as {images[0]}) and shards or tables ({len(containers):,}, such as {containers[0]})",
        fix=f"Name what is meant: {ways[0]} or {ways[1]}, or both as two sources.",
    )


def _list_folder(folder: Path, passed: PassedOver, label_depth: int | None) -> list[Found]:
    """Images below a folder; where there are none, those in its shards or Parquet files."""
    root = str(folder).rstrip("/")
    walked = walk(root)
    images: list[str] = []
    containers: list[str] = []
    for name in walked.files:
        suffix = suffix_of(name)
        if suffix in SUFFIXES:
            images.append(name)
        elif suffix in CONTAINERS:
            containers.append(name)
        else:
            walked.pass_over(name.rpartition("/")[0], suffix_reason(suffix))
    passed.reasons.update(walked.reasons)
    if images and containers:
        raise _mixture(folder, folder, images, containers)
    if images:
        tops = frozenset(name.split("/")[0] for name in images if "/" in name)
        passed.lost_classes.extend(walked.lost(images, max(1, class_depth(tops, label_depth))))
        return _list_files(root, images, label_depth)
    return _list_containers(folder, sorted(containers), passed, label_depth)


def _list_files(root: str, names: Sequence[str], depth: int | None) -> list[Found]:
    return _label([Found(Location(Kind.FILE, root, name), "") for name in names], depth)


def _list_containers(
    folder: Path, names: Sequence[str], passed: PassedOver, depth: int | None
) -> list[Found]:
    """Images of shards and Parquet files. Where no shard has labels, the folders of members' names are classes."""
    held_out = held_out_files(names) if depth is None else frozenset()
    found: list[Found] = []
    has_labels = False
    for name in names:
        for location, label in _members(folder / name, passed):
            has_labels |= location.kind is Kind.TAR and label is not None
            found.append(Found(location, label or "", name in held_out))
    return _label(found, depth, has_labels=has_labels)


def _members(path: Path, passed: PassedOver) -> Sequence[tuple[Location, str | None]]:
    """Images of a shard or Parquet file; what is passed over counts once, however often storage refuses the file."""

    def attempt() -> tuple[Sequence[tuple[Location, str | None]], PassedOver]:
        fresh = PassedOver()
        if suffix_of(path.name) == ".parquet":
            return list(list_rows(path, fresh)), fresh
        return list_members(path, SUFFIXES, fresh), fresh

    members, besides = Storage().read(str(path), attempt)
    passed.add(besides)
    return members


def _label(found: list[Found], depth: int | None, *, has_labels: bool = False) -> list[Found]:
    """Classes, and what is held out, by the folders of names; ``has_labels`` keeps the labels that are there."""
    folders = [folders_of(each.location) for each in found]
    tops = frozenset(parts[0] for parts in folders if parts)
    if not tops:
        return found
    level = class_depth(tops, depth)
    kept_out = held_out_folders(tops, has_loose=not all(folders), depth=depth)
    labelled = []
    for each, parts in zip(found, folders, strict=True):
        label = parts[level - 1] if 0 < level <= len(parts) else ""
        labelled.append(
            replace(
                each,
                label=each.label if has_labels or each.location.kind is Kind.PARQUET else label,
                is_held_out=each.is_held_out or (bool(parts) and parts[0] in kept_out),
            )
        )
    return labelled


def _list_lines(path: Path, passed: PassedOver) -> list[Found]:
    """Images named by the lines of a file; blank lines, comments and what systems leave are passed over."""
    data = Storage().read(str(path), path.read_bytes)
    coding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    text = data.removeprefix(codecs.BOM_UTF8).decode(coding, "surrogateescape")
    found = []
    for line in re.split(r"\r\n|\r|\n", text):
        name = _path_of(line.strip(" \t"), path.parent)
        last = name.rpartition("/")[2]
        reason = reason_of((), last) if last.startswith("._") else ""
        if reason:
            passed.reasons[reason] += 1
        elif name:
            found.append(Found(Location(Kind.FILE, str(path.parent), name), ""))
    return found


def _path_of(line: str, folder: Path) -> str:
    """The path in a line of a list: what is there as it is written, else without comment, with ``~`` and variables replaced."""
    if not line or line.startswith("#"):
        return ""
    comment = COMMENT.search(line)
    if comment and not os.path.lexists(os.path.join(folder, line)):  # noqa: PTH118  # keeps text
        line = line[: comment.start()].rstrip(" \t")
    return replace_variables(line, folder)


def list_tar(path: Path) -> Iterator[Found]:
    """Images of one shard."""
    yield from _list_containers(path.parent, [path.name], PassedOver(), None)


def list_parquet(path: Path) -> Iterator[Found]:
    """Rows of a Parquet file; needs pyarrow."""
    for location, label in _members(path, PassedOver()):
        yield Found(location, label or "")


INDEX_FOLDER = "index"  # in a folder that was packed or chosen: which images there are
CONTAINERS = {".tar": list_tar, ".parquet": list_parquet}


def find_problem(source: str, *, has_lister: bool) -> str:
    """What is wrong with a source as far as names show, without reading any file; empty where nothing is.

    Raises:
        Nothing.
    """
    known = {*SUFFIXES, *CONTAINERS}
    try:
        paths = expand(source).paths
    except DataError as error:
        text = error.message.removeprefix("data.sources: ")
        if text != f"{source} is not there":
            return f"{source!r}{text.removeprefix(source)}" if text.startswith(source) else text
        paths = ()
    if paths and (has_lister or len(paths) > 1):
        return ""
    if paths and paths[0].is_dir():
        if (paths[0] / INDEX_FOLDER / "index.json").is_file():
            return ""
        if any(suffix_of(name) in known for _, _, names in os.walk(paths[0]) for name in names):
            return ""
        kinds = ", ".join(sorted(suffix[1:] for suffix in known))
        return f"{source!r} holds no image ({kinds}), in no subfolder either"
    if paths and suffix_of(paths[0].name) in known | LIST_SUFFIXES:
        return ""
    if has_lister:
        return f"{source!r} is not there"
    kinds = "a folder with images, a .tar or .parquet file, a .txt list, or a pattern of these"
    return f"{source!r} is not there or no source of images - give {kinds}"


def refuse_added(packed: Path, known: Sequence[str], index: Path) -> None:
    """Refuses a packed source that images or shards, other than the known ones, were put into.

    Raises:
        DataError: there are some.
    """
    shards = {os.path.realpath(path) for path in known}
    for path in sorted(packed.iterdir()):
        suffix = suffix_of(path.name)
        if suffix in SUFFIXES or (suffix in CONTAINERS and os.path.realpath(path) not in shards):
            raise DataError(
                f"data.sources: {packed} was packed, and {path.name} was added later",
                fix=f"Move it elsewhere, or remove {index} so that all is listed again.",
            )
