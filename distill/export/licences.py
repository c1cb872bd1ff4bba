"""Under which licences a network may be passed on: what its folder states, and the files that go with it.

A student is made from its teacher, so what the teacher's folder holds (LICENSE, NOTICE and the like) lies in
the student's folder too, in every export of it, and in the folders of students that it teaches in turn.
``distill.json`` lists the networks of that chain under ``licences``. A licence that is stated nowhere stays
unknown, and statements that contradict each other are shown, never settled here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from distill.errors import CheckpointError
from distill.export.licence_files import (
    IS_TERMS,
    decoded,
    licence_files,
    licence_name,
    merged,
    read_licence,
    read_licence_files,
    title_of,
)
from distill.export.licence_names import (
    IDENTIFIERS,
    OTHER,
    RECOGNISED,
    UNKNOWN,
    identifier_of_text,
    identifiers_of,
    slug_of,
)
from distill.runfolder.files import replace_text, replaced, write_file

RECORD, CARD, CONFIG, SINGLE = "distill.json", "README.md", "config.json", "model.safetensors"
KEY, CONTRADICTION = "teacher.licence", "contradicting statements"
KNOWN = IDENTIFIERS | RECOGNISED


@dataclass(frozen=True)
class Terms:
    """What is stated about one network of the chain.

    ``identifiers``: as Hugging Face names licences; ``files``: names in the folder; ``problem``: why the
    licence is not known, empty where it is; ``is_pretrained``: a network of the user's, trained from scratch.
    """

    network: str
    identifiers: tuple[str, ...] = ()
    name: str = ""
    link: str = ""
    files: tuple[str, ...] = ()
    problem: str = ""
    is_pretrained: bool = False

    def describe(self) -> str:
        """Writes it in one line."""
        if self.problem:
            what = f"unknown: {self.problem}"
        elif self.identifiers or self.link:
            what = self.name or " or ".join(self.identifiers) or "as its link states"
        else:
            what = "none is stated; it was pretrained from scratch by the user of distill"
        files = f"; files: {', '.join(f'`{name}`' for name in self.files)}" if self.files else ""
        return f"{self.network}: {what}{f' ({self.link})' if self.link else ''}{files}"


@dataclass(frozen=True)
class Licences:
    """The networks that one was made from, nearest first, and the contents of their files by name."""

    terms: tuple[Terms, ...] = ()
    texts: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """What is unknown or contradicts itself, a clause for each network."""
        return [f"{each.network}: {each.problem}" for each in self.terms if each.problem]

    @property
    def is_known(self) -> bool:
        """Whether a licence is stated, and nothing is unknown."""
        return not self.problems and any(each.identifiers or each.link for each in self.terms)

    def to_json(self) -> list[dict[str, Any]]:
        """The part ``licences`` of ``distill.json``."""
        held = (asdict(each) for each in self.terms)
        return [
            {k: list(v) if isinstance(v, tuple) else v for k, v in each.items()} for each in held
        ]

    def front_matter(self) -> dict[str, str]:
        """The keys ``license``, ``license_name`` and ``license_link`` of a card; empty where no licence is stated and none is missing."""
        if self.problems:
            return {"license": UNKNOWN}
        found = sorted({name for each in self.terms for name in each.identifiers})
        files = [name for each in self.terms for name in each.files]
        link = next((each.link for each in self.terms if each.link), "")
        if not found and not link:
            return {}
        if len(found) == 1 and found[0] in IDENTIFIERS:
            return {"license": found[0]}
        name = "-and-".join(found) or "see-link"
        link = link or next((f for f in files if f in {"LICENSE", "LICENSE.md"}), "")
        return {"license": OTHER, "license_name": name, **({"license_link": link} if link else {})}

    def metadata(self) -> dict[str, str]:
        """What goes into the file itself where a format has room: front matter, a line per network, all texts."""
        lines = {"licences": "\n".join(each.describe() for each in self.terms)}
        texts = {f"license_text:{name}": decoded(text) for name, text in self.texts.items()}
        return {**self.front_matter(), **lines, **texts} if self.terms else {}


@dataclass(frozen=True)
class Stated:
    """What the user states by ``teacher.licence``; empty where she does not."""

    name: str = ""
    link: str = ""
    file: Path | None = None


@dataclass(frozen=True)
class _Statement:
    where: str
    identifiers: frozenset[str]
    link: str = ""
    is_text: bool = False


def licences_of(
    weights: Path | None, network: str, stated: Stated | None = None, heads: Path | None = None
) -> Licences:
    """The licences of a network in a folder or file, and of those that it was made from.

    ``weights`` is None for a network that is yet to be pretrained; ``heads`` is a folder of heads that belong
    to it. A bare file states nothing: what lies beside it may be of something else. It belongs to a folder
    where it is that folder's ``model.safetensors`` or is listed in its ``distill.json``.

    Raises:
        CheckpointError: a licence file cannot be read.
    """
    folder, stated = None if weights is None else folder_of(weights), stated or Stated()
    record = record_in(folder)
    chain, texts = _chain(record, folder)
    contents = {} if folder is None else read_licence_files(folder, texts.keys())
    if heads is not None and heads != folder:
        contents = merged(contents, read_licence_files(heads, ()), heads.name)[0]
    if stated.file is not None:
        contents = merged(
            contents, {licence_name(stated.file.name): read_licence(stated.file)}, "stated"
        )[0]
    all_texts, names = merged(texts, contents, network)
    carried = frozenset(name for each in chain for name in each.identifiers)
    found = _statements(folder, contents, stated, carried)
    is_pretrained = weights is None or _is_pretrained(record)
    problem = _contradiction(found, carried)
    if weights is not None and not (problem or found or chain or is_pretrained):
        problem = _none_stated(weights, folder)
    terms = Terms(
        network,
        _identifiers(found),
        stated.name or next((title_of(contents[n]) for n in contents if IS_TERMS.search(n)), ""),
        next((each.link for each in found if each.link), ""),
        tuple(names),
        problem,
        is_pretrained,
    )
    if stated != Stated():
        chain = tuple(_settled(each, terms) for each in chain)
    is_new = found or names or problem or (is_pretrained and not chain)
    return Licences((terms, *chain) if is_new else chain, all_texts)


def licences_in(folder: Path) -> Licences:
    """The licences that ``write_licences`` put into a folder, or what the folder of another program states."""
    record = record_in(folder)
    if "licences" not in record:
        return licences_of(folder, folder.name)
    return Licences(*_chain(record, folder))


def write_licences(folder: Path, licences: Licences) -> None:
    """Writes the licence files into a folder; each is complete or as it was. Files of an earlier chain are removed."""
    for each in _terms_in(record_in(folder)):
        for name in set(each.files) - licences.texts.keys():
            (folder / name).unlink(missing_ok=True)
    for name, text in licences.texts.items():
        with replaced(folder / name) as aside:
            write_file(aside, [text])


def pass_on(source: Path, target: Path) -> Licences:
    """Gives a converted network the record and licences of its source, where it is a folder and they state something.

    Returns:
        The licences: what is to be sent along where the target is one file.
    """
    licences = licences_of(source, source.name)
    record = record_in(folder_of(source))
    if target.is_dir() and (licences.is_known or licences.texts or record):
        write_licences(target, licences)
        held = {key: value for key, value in record.items() if key not in ("export", "files")}
        text = json.dumps({**held, "licences": licences.to_json()}, indent=2) + "\n"
        replace_text(target / RECORD, text)
    return licences


def folder_of(weights: Path) -> Path | None:
    """The folder whose statements hold for weights: the folder itself, or that which a file belongs to; None for a bare file."""
    if weights.is_dir():
        return weights
    parent = weights.parent
    if weights.name == SINGLE and (parent / CONFIG).is_file():
        return parent
    return parent if weights.name in (record_in(parent).get("files") or ()) else None


def front_matter_of(card: Path) -> dict[str, Any]:
    """The YAML at the head of a card; empty where there is none that can be read."""
    try:
        text = card.read_text(encoding="utf-8-sig", errors="replace").replace("\r\n", "\n")
    except OSError:
        return {}
    parts = re.split(r"^---[ \t]*$", text, maxsplit=2, flags=re.MULTILINE)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        head = YAML(typ="safe").load(parts[1])
    except YAMLError:
        return {}  # someone else's card; then it states nothing that we can read
    return head if isinstance(head, dict) else {}


def record_in(folder: Path | None) -> dict[str, Any]:
    """What ``distill.json`` of a folder records; empty where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    is_there = folder is not None and (folder / RECORD).is_file()
    return _read_object(folder / RECORD) if folder is not None and is_there else {}


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error})", fix="Check that the file was copied completely."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object", fix="Remove or repair it.")
    return value


def _is_pretrained(record: Mapping[str, Any]) -> bool:
    """Whether distill trained the network without a teacher; 0.1.0 wrote no method, and a fingerprint of teachers."""
    is_old = "recipe_hash" in record and not record.keys() & {"teacher_fingerprint", "export"}
    return bool(record.get("method", "pretraining" if is_old else "") == "pretraining")


def _settled(terms: Terms, stated: Terms) -> Terms:
    """An unknown licence of the chain as the user states it; a contradiction stays."""
    if not terms.problem or CONTRADICTION in terms.problem:
        return terms
    known = stated.identifiers, stated.name, stated.link
    return replace(terms, problem="", identifiers=known[0], name=known[1], link=known[2])


def _terms_in(record: Mapping[str, Any]) -> list[Terms]:
    """The chain of a record; what another version or a hand wrote otherwise is passed over."""
    known, found = Terms.__annotations__.keys(), []
    for each in record.get("licences") or ():
        if isinstance(each, dict) and isinstance(each.get("network"), str):
            values = {name: value for name, value in each.items() if name in known}
            for name in ("identifiers", "files"):
                values[name] = tuple(map(str, values.get(name) or ()))
            values["files"] = tuple(
                n for n in values["files"] if Path(n).name == n == licence_name(n)
            )
            found.append(Terms(**values))
    return found


def _chain(
    record: Mapping[str, Any], folder: Path | None
) -> tuple[tuple[Terms, ...], dict[str, bytes]]:
    """The chain of a record and the files of it; a file that is gone is a problem of its network."""
    terms, texts = [], dict[str, bytes]()
    for each in _terms_in(record):
        assert folder is not None, "a record lies in a folder"
        texts |= {
            name: read_licence(folder / name) for name in each.files if (folder / name).is_file()
        }
        lost = [name for name in each.files if name not in texts]
        if lost and not each.problem:
            each = replace(each, problem=f"{', '.join(lost)} is no longer in {folder.name}")
        terms.append(replace(each, files=tuple(name for name in each.files if name in texts)))
    return tuple(terms), texts


def _statements(
    folder: Path | None, contents: Mapping[str, bytes], stated: Stated, carried: frozenset[str]
) -> list[_Statement]:
    """Who states which licence: the key, the texts, the card, the config, an earlier record; not what only repeats the chain."""
    found = [_Statement(KEY, identifiers_of(stated.name), stated.link)]
    for name, text in contents.items():
        if IS_TERMS.search(name):
            title = identifier_of_text(decoded(text)) or slug_of(title_of(text))
            found.append(_Statement(name, frozenset({title or slug_of(name)}), is_text=True))
    if folder is not None:
        record = record_in(folder)
        found.append(_of_mapping(CARD, front_matter_of(folder / CARD)))
        if (folder / CONFIG).is_file():
            config = _read_object(folder / CONFIG)
            inner = config.get("pretrained_cfg")
            found.append(_of_mapping(CONFIG, config))
            found.append(_of_mapping(CONFIG, inner if isinstance(inner, dict) else {}))
        if "licences" not in record:
            line = str(record.get("licence") or record.get("license") or "")
            found.append(_Statement(RECORD, identifiers_of(_old(line))))
        elif carried:
            found = [
                each
                for each in found
                if each.is_text or each.where == KEY or not _repeats(each, carried)
            ]
    return [each for each in found if each.identifiers or each.link]


def _repeats(statement: _Statement, carried: frozenset[str]) -> bool:
    """Whether a card or config that distill wrote names the licences of the chain, and nothing else."""
    joined = frozenset({"-and-".join(sorted(carried))})
    return statement.identifiers <= carried or statement.identifiers == joined


def _old(text: str) -> str:
    """The name in the line that 0.1.0 wrote: ``other, dinov3-license, LINK``."""
    parts = [part.strip() for part in text.split(",")]
    named = [part for part in parts if part != OTHER and "://" not in part]
    return named[0] if named and not named[0].startswith(UNKNOWN) else ""


def _of_mapping(where: str, values: Mapping[str, Any]) -> _Statement:
    """The licence in a card's front matter or in a config."""
    given = values.get("license") or values.get("licence") or ""
    name = " or ".join(map(str, given)) if isinstance(given, list) else str(given)
    ids = identifiers_of(name) or identifiers_of(str(values.get("license_name") or ""))
    return _Statement(where, ids, str(values.get("license_link") or ""))


def _identifiers(found: Sequence[_Statement]) -> tuple[str, ...]:
    """What the statements agree on; a name counts before the title of a text that is not known."""
    texts, names = (
        frozenset[str]().union(*(each.identifiers for each in found if each.is_text == is_text))
        for is_text in (True, False)
    )
    return tuple(
        sorted((texts & names) or (texts | names if texts & RECOGNISED else names or texts))
    )


def _contradiction(found: Sequence[_Statement], carried: frozenset[str]) -> str:
    """How statements disagree: names with each other, or with the texts that lie there; empty where they do not."""
    texts = [each for each in found if each.is_text]
    held = carried.union(*(each.identifiers for each in texts))
    sides = [(each.where, each.identifiers) for each in found if not each.is_text]
    names = [each for each in sides if each[1]]
    if held:
        names.append((", ".join(each.where for each in texts) or "its licence files", held))
    for index, (_, left) in enumerate(names):
        for _, right in names[:index]:
            if not left & right and (left | right <= KNOWN or (left | right) & RECOGNISED):
                stated = (f"{where}: {' and '.join(sorted(ids))}" for where, ids in names)
                return f"{CONTRADICTION} ({'; '.join(dict.fromkeys(stated))})"
    in_texts = frozenset[str]().union(*(each.identifiers for each in texts))
    if len(in_texts) > 1 and not any(ids for _, ids in sides):
        return f"its files hold {' and '.join(sorted(in_texts))}, and which of them applies is not stated"
    return ""


def _none_stated(weights: Path, folder: Path | None) -> str:
    """Where no licence was found."""
    if folder is not None:
        return "its folder states no licence"
    around = licence_files(weights.parent)
    beside = f" ({around[0].name} beside it may be of something else)" if around else ""
    return f"a bare file states no licence{beside}"
