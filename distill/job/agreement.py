"""What all ranks must have in common before the first step, compared once: code, versions, recipe, images, teacher.

Each rank sends in short what it reads and runs, and compares all the others with rank 0. A node with
another version, another file at the same path, or storage that is not shared ends the job with one
line; it would train along otherwise, and nothing would show it.
"""

import hashlib
import json
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from distill.data.index import ImageIndex
from distill.data.locations import Kind, Reader
from distill.errors import CheckpointError, DataError, SetupError
from distill.job.initial import inits_of
from distill.job.prepare import Job
from distill.listing.outside_code import path_of
from distill.listing.storage import Storage
from distill.recipe.init_keys import InitSpec
from distill.recipe.keys import FamilyRecipe
from distill.recipe.types import is_custom
from distill.weights.initial import find_initial, init_key
from distill.weights.teacher_files import files_of_weights

PACKAGES = ("distill", "teacher", "students")
DISTRIBUTION = "distill-family"
COMPUTING = (
    "torch",
    "deepspeed",
    "numpy",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "timm",
    "transformers",
)
ROW_BYTES = 2304  # of what a rank sends
LONGEST = 200  # letters of one value, of 9
BLOCKS, BLOCK_BYTES = 32, 2**16  # of a large file, evenly spread: a teacher of 28 GB costs 2 MB
ENTRIES, PICTURES = 64, 4  # of an index, evenly spread: compared, and read
NAMED = 4  # ranks, or groups of them, in a line
UNREAD = "nothing that can be read"

FIXES: Mapping[str, str] = {
    "distill": "Install the same distill on every node.",
    "versions": "Install the same packages on every node, such as with constraints.txt.",
    "students' modules": "Give every node the same files of the modules that `arch` names.",
    "recipe": "Put --out on storage that all nodes share.",
    "index": "Put --out on storage that all nodes share.",
    "images": "Give every node the same images at the paths of data.sources.",
    "teacher.weights": "Give every node the same files there.",
    "teacher.heads": "Give every node the same file there.",
    "init": "Give every node the same files there.",
}


def facts_of(job: Job) -> dict[str, str]:
    """Returns what this process reads and runs, by the keys of ``FIXES``, in milliseconds however large the files are.

    What cannot be read has a value too: the others may read it.
    """
    recipes = [each for each in (job.recipe, job.teacher_recipe) if each is not None]
    versions = {name: _version(name) for name in COMPUTING}
    facts = {
        "distill": f"{_version(DISTRIBUTION)}, files {_hash(_source_code())}",
        "versions": ", ".join(f"{name} {found}" for name, found in versions.items() if found),
        "students' modules": _hash(_code_of_students(job)),
        "recipe": _hash(each.model_dump_json().encode() for each in recipes),
    }
    try:
        folders = sorted(path.parent for path in (job.run_folder / "data").glob("*/index.json"))
        if not folders:
            raise FileNotFoundError(job.run_folder / "data")
        indices = [ImageIndex.load(folder) for folder in folders]
    except (OSError, DataError) as error:
        facts["index"] = type(error).__name__
    else:
        facts["index"] = _hash(part for index in indices for part in _entries(index))
        facts["images"] = _hash(part for index in indices for part in _pictures(index))
    if isinstance(job.recipe, FamilyRecipe) and job.recipe.teacher.weights is not None:
        with suppress(OSError):
            weights, heads = job.teacher_paths
            files = files_of_weights(weights)
            facts["teacher.weights"] = f"{weights}, {_hash(map(_sample, files))}"
            if heads is not None and job.recipe.teacher.heads_mode == "file":
                facts["teacher.heads"] = f"{heads}, {_hash([_sample(heads)])}"
    starts = [
        _files_of_init(name, init)
        for name, init in inits_of((job.recipe, job.teacher_recipe)).items()
    ]
    if starts:
        facts["init"] = _hash(_sample(path) for files in starts for path in files)
    return facts


def _files_of_init(name: str, init: InitSpec) -> list[Path]:
    """The files that a network starts from; none where they are gone, which a resume does not need."""
    with suppress(OSError, CheckpointError):
        found = find_initial(init_key(name), init)
        return [*files_of_weights(found.weights), *([found.parts] if found.parts else [])]
    return []


def require_agreement(job: Job, control: dist.ProcessGroup) -> None:
    """Compares every rank with rank 0.

    Communication: one all-gather of ``ROW_BYTES`` over ``control``, a gloo group of the world; none for one rank.

    Raises:
        SetupError: on every rank, where one differs.
    """
    num_ranks = dist.get_world_size(control)
    if num_ranks == 1:
        return
    facts = {name: _shortened(value) for name, value in facts_of(job).items()}
    text = json.dumps([socket.gethostname(), facts]).encode()
    assert len(text) <= ROW_BYTES, f"{len(text)} bytes of facts"
    row = torch.frombuffer(bytearray(text.ljust(ROW_BYTES)), dtype=torch.uint8)
    rows = [torch.empty_like(row) for _ in range(num_ranks)]
    dist.all_gather(rows, row, group=control)
    received = (json.loads(each.numpy().tobytes()) for each in rows)
    compare([(str(host), dict(facts)) for host, facts in received])


def compare(ranks: Sequence[tuple[str, Mapping[str, str]]]) -> None:
    """Compares host and facts of each rank, in rank order, with the first.

    Raises:
        SetupError: naming what differs, the ranks and hosts where it does, and both values.
    """
    host, first = ranks[0]
    for name, fix in FIXES.items():
        value, others = first.get(name, UNREAD), dict[tuple[str, str], list[int]]()
        for rank, (where, facts) in enumerate(ranks):
            if facts.get(name, UNREAD) != value:
                others.setdefault((where, facts.get(name, UNREAD)), []).append(rank)
        if not others:
            continue
        parts = [
            f"{name_ranks(found)} on {where} with {theirs}"
            for (where, theirs), found in others.items()
        ]
        more = f" and {len(parts) - NAMED} more groups" if len(parts) > NAMED else ""
        raise SetupError(
            f"{name} is not the same on all ranks: rank 0 on {host} runs with {value}, {'; '.join(parts[:NAMED])}{more}",
            fix=fix,
        )


def name_ranks(ranks: Sequence[int], most: int = NAMED) -> str:
    """Names the first ``most`` of some ranks, and how many more there are."""
    text = ", ".join(map(str, ranks[:most]))
    more = f" and {len(ranks) - most} more" if len(ranks) > most else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {text}{more}"


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d," % len(part))
        digest.update(part)
    return digest.hexdigest()[:12]


def _shortened(value: str) -> str:
    """A value that fits into a row with all the others: of a long one (paths) the end, and a hash of all."""
    text = value.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= LONGEST else f"{_hash([text.encode()])} ...{text[-LONGEST // 2 :]}"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _source_code() -> Iterator[bytes]:
    for name in PACKAGES:
        folder = Path(import_module(name).__path__[0])
        for path in sorted(folder.rglob("*.py")):
            yield str(path.relative_to(folder)).encode()
            yield path.read_bytes()


def _code_of_students(job: Job) -> Iterator[bytes]:
    """The files of the modules that students from outside are made by, without what those import."""
    if not isinstance(job.recipe, FamilyRecipe):
        return
    for arch in sorted(
        {student.arch for student in job.recipe.students if is_custom(student.arch)}
    ):
        yield arch.encode()
        path = path_of(arch)
        with suppress(OSError):  # a package without __init__.py is a folder
            if path is not None:
                yield path.read_bytes()


def _entries(index: ImageIndex) -> Iterator[bytes]:
    yield repr((len(index), index.sources, index.class_names, index.containers)).encode()
    for image in _spread(len(index), ENTRIES):
        label = None if index.labels is None else int(index.labels[image])
        yield repr((index.location(image), index.hw[image].tolist(), label)).encode()


def _pictures(index: ImageIndex) -> Iterator[bytes]:
    reader = Reader()
    for image in _spread(len(index), PICTURES):
        location = index.location(image)
        try:
            if location.kind is Kind.PARQUET:  # a row costs its full group
                yield _sample(Path(location.container))
            else:
                yield reader.read(location).tobytes()
        except OSError as error:
            yield type(error).__name__.encode()


def _sample(path: Path) -> bytes:
    """Name, size and some blocks of a file, the first and the last among them."""
    try:
        return Storage().read(str(path), partial(_blocks, path))
    except OSError as error:
        return type(error).__name__.encode()


def _blocks(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        blocks = [path.name.encode(), b"%d" % size]
        for block in _spread(-(-size // BLOCK_BYTES), BLOCKS):
            file.seek(block * BLOCK_BYTES)
            blocks.append(file.read(BLOCK_BYTES))
    return b"".join(blocks)


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the numbers below ``count``, evenly spread from the first to the last."""
    if count <= most:
        return list(range(count))
    return [index * (count - 1) // (most - 1) for index in range(most)]
