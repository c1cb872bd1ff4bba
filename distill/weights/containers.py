"""Files and folders of tensors, opened safely: names and shapes first, then one tensor at a time.

Nothing in a file is ever executed: pickles are read with ``weights_only`` and may hold tensors in
dicts, nothing else. Files are memory-mapped and opened anew for every tensor's worth of bytes, so
that what is mapped does not pile up.
"""

import errno
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor

from distill.errors import CheckpointError, UserError
from distill.listing.storage import Storage, is_of_file
from distill.weights.file_kinds import NUM_BYTES, ZIP, describe_folder, refuse_other_kinds

REFUSED = "Weights only load failed"  # how torch begins when it meets anything but tensors
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"  # in folders that older versions of transformers wrote
T = TypeVar("T")
LONGEST_HEADER = 100 * 10**6  # bytes of names and shapes, as safetensors allows


@runtime_checkable
class Container(Protocol):
    """A file or folder of tensors, opened."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def read(self, name: str) -> Tensor:
        """One tensor; may be a view of the mapped file."""
        ...


class _Safetensors:
    """One file, or the shards of an index."""

    def __init__(self, path: Path, files: Mapping[str, Path] | None = None) -> None:
        """``files``: which file holds which tensor, for shards."""
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        for file in [path] if files is None else sorted(set(files.values())):
            refuse_other_kinds(file, _start_of(file))
            with reading(file), safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # not a mapping
                    part = opened.get_slice(name)
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = part.get_dtype().lower()
                    self._file_of[name] = file
        absent = sorted(set(files or ()) - self.shapes.keys())
        if absent:
            raise CheckpointError(
                f"{path}: {len(absent)} tensors of the index are in no shard, first {absent[0]}",
                fix="Copy all shards of the folder.",
            )

    def read(self, name: str) -> Tensor:
        file = self._file_of[name]
        with reading(file), safe_open(file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor


class _Pickled:
    """A ``.pth`` file: tensors in dicts, mapped; anything else is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = self._open()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.dtypes = {
            name: str(tensor.dtype).removeprefix("torch.") for name, tensor in self._tensors.items()
        }
        self._largest = max(map(_num_bytes, self._tensors.values()), default=0)
        self._read_bytes = 0

    def read(self, name: str) -> Tensor:
        if self._read_bytes > self._largest:
            self._tensors, self._read_bytes = self._open(), 0
        tensor = self._tensors[name]
        self._read_bytes += _num_bytes(tensor)
        return tensor

    def _open(self) -> dict[str, Tensor]:
        try:
            loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # the unpickler raises whatever a broken stream leads it to
            if REFUSED not in str(error):
                raise broken_file(self.path, error) from error
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            named = f" (it names {found[1]})" if found else ""
            raise CheckpointError(
                f"{self.path}: holds more than tensors{named}; it was not executed",
                fix="Only dicts of tensors are read. Save the state dict alone with torch.save.",
            ) from error
        return dict(self._flat(loaded, ""))

    def _flat(self, value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if isinstance(item, Tensor | Mapping):
                    yield from self._flat(item, f"{name}.{key}" if name else str(key))
        else:
            raise CheckpointError(
                f"{self.path}: {name or 'the file'} is a {type(value).__name__}, not tensors in dicts",
                fix="Give a state dict.",
            )


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def broken_file(path: Path, error: Exception) -> CheckpointError:
    """What to say of a file that cannot be read."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"{path}: cannot be read ({reason})", fix="Check that the file was copied completely."
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a damaged file leads its reader to becomes one clear line; an error of ours stays as it is.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise broken_file(path, error) from error


def read_again(storage: Storage, path: Path, attempt: Callable[[], T]) -> T:
    """The result of an attempt to read weights at ``path``, made again while storage refuses them.

    Raises:
        CheckpointError: the weights are wrong.
        StorageError: the storage has refused them for too long.
    """

    def raising() -> T:
        try:
            return attempt()
        except CheckpointError as error:
            refusal = _refusal_in(error.__cause__, path)
            if refusal is not None and not is_of_file(refusal, str(path)):
                raise refusal from error
            raise

    return storage.read(str(path), raising)


def _refusal_in(cause: BaseException | None, path: Path) -> OSError | None:
    """The error of the system that a reader met, also where the reader hides its number."""
    if isinstance(cause, FileNotFoundError) and cause.errno is None and path.exists():
        return OSError(errno.EIO, "cannot be opened")  # safetensors: for every error of open
    if isinstance(cause, OSError):
        return cause
    found = re.search(r"^unable to .* \((\d+)\)$", str(cause).partition("\n")[0])  # torch's mmap
    return None if found is None else OSError(int(found[1]), str(cause))


def open_weights(path: Path) -> Container:
    """A folder, a ``.safetensors`` file or a ``.pth`` file, opened; no tensor is read yet.

    Raises:
        CheckpointError: it is none of these, or damaged, or holds something else than tensors.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder", fix="Check the path.")
    if path.is_dir():
        return _open_folder(path)
    return _open_file(path)


def _open_file(path: Path) -> Container:
    """By what is in it, whatever its suffix."""
    start = _start_of(path)
    refuse_other_kinds(path, start)
    if start.startswith(ZIP):
        return _Pickled(path)
    if path.suffix == ".safetensors" or _has_header(start):
        return _Safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin"):
        raise CheckpointError(
            f"{path}: not in the zip format that torch.save writes since 1.6",
            fix="Load it in the torch version it was made with and save the state dict again.",
        )
    raise CheckpointError(
        f"{path}: not a file of weights", fix="Give a folder, a .safetensors or a .pth file."
    )


def _start_of(path: Path) -> bytes:
    with reading(path), path.open("rb") as file:
        return file.read(NUM_BYTES)


def _has_header(start: bytes) -> bool:
    """Begins as a safetensors file does: the length of a JSON object, and the object."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= LONGEST_HEADER


def _open_folder(folder: Path) -> Container:
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX)
        files = listed.get("weight_map") if isinstance(listed, dict) else None
        if not isinstance(files, dict) or not all(map(_is_file_name, files.values())):
            raise CheckpointError(
                f"{folder / INDEX}: no weight_map of plain file names",
                fix="Check that the folder was copied completely.",
            )
        shards = sorted(set(files.values()))
        absent = [name for name in shards if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(
                f"{folder}: {len(absent)} of {len(shards)} shards are missing, first {absent[0]}",
                fix="Copy all shards of the folder.",
            )
        return _Safetensors(folder, {key: folder / name for key, name in files.items()})
    for name in (SINGLE, PICKLED):
        if (folder / name).is_file():
            return _open_file(folder / name)
    what, fix = describe_folder(folder)
    raise CheckpointError(f"{folder}: {what}", fix=fix)


def _is_file_name(name: object) -> bool:
    """A name in the folder itself, and no way out of it."""
    return isinstance(name, str) and Path(name).name == name


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        CheckpointError: it is damaged.
    """
    refuse_other_kinds(path, _start_of(path))
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8"))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is damaged, or holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: holds {type(value).__name__}, not an object", fix="Remove or repair it."
        )
    return value


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity, judged by the extremes: no copy is made but of one-byte numbers, which have none."""
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()
    return tensor.numel() == 0 or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
