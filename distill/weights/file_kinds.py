"""What a file or folder is that holds no weights for us, known by its first bytes and by names beside it."""

import re
import zipfile
from collections import Counter
from pathlib import Path

from distill.errors import CheckpointError

LFS = b"version https://git-lfs"
ZIP = b"PK\x03\x04"
NUM_BYTES = 512  # of a file's start
_AGAIN = "Download the file itself; a login or a licence to accept may stand before it."
_OURS = "Give a Hugging Face folder, a .safetensors or a .pth file of a DINOv3 network."
_UNPACK = "Unpack it first."
_CONVERT = "Convert it to .safetensors or .pth with the library that wrote it."
_LIBRARIES = {
    b"GGUF": "a GGUF file of llama.cpp",
    b"\x89HDF": "an HDF5 file (Keras, TensorFlow)",
    b"\x93NUMPY": "a NumPy array",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"\x89PNG": "a picture (PNG)",
}
_SUFFIXES = {
    ".onnx": "an ONNX graph",
    ".pb": "a TensorFlow graph",
    ".h5": "a Keras file",
    ".msgpack": "Flax weights",
    ".gguf": "a GGUF file of llama.cpp",
    ".npz": "NumPy arrays",
    ".index": "a TensorFlow checkpoint",
}


def refuse_other_kinds(path: Path, start: bytes) -> None:
    """Passes a file that may hold weights.

    Args:
        path: of the file.
        start: its first bytes, at least 128 where it has them.

    Raises:
        CheckpointError: it is empty, a stand-in, a page, an archive or a file of another library.
    """
    what, fix = _kind(path, start)
    if what:
        raise CheckpointError(f"{path}: {what}", fix=fix)


def _kind(path: Path, start: bytes) -> tuple[str, str]:
    if not start:
        return "an empty file", "Check that it was copied completely."
    if start.startswith(LFS):
        size = re.search(rb"size (\d+)", start)
        of = f" of {int(size[1]) / 1e6:,.1f} MB" if size else ""
        fix = "Run `git lfs pull` in its folder, or download the file itself."
        return f"a Git LFS pointer, not the file{of} that it stands for", fix
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")):
        return "a web page saved under this name, no weights", _AGAIN
    if text.startswith((b'{"error', b"access denied", b"access to model", b"invalid username")):
        return "the error message of a server saved under this name, no weights", _AGAIN
    for magic, what in _LIBRARIES.items():
        if start.startswith(magic):
            return what, _OURS if "picture" in what else _UNPACK if "arch" in what else _CONVERT
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix], _CONVERT
    if start[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    return _zip_kind(path) if start.startswith(ZIP) else ("", "")


def _zip_kind(path: Path) -> tuple[str, str]:
    """Of a zip archive: those of torch.save have ``data.pkl``."""
    try:
        with zipfile.ZipFile(path) as opened:
            names = opened.namelist()
    except Exception:  # a damaged archive leads its reader to many
        return "", ""  # torch reports what is broken
    has = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in has:
        return (
            "a TorchScript program, not tensors",
            "Load it with torch.jit and save its state_dict().",
        )
    if "archive_format" in has or "serialized_exported_program.json" in has:
        return "an exported program of torch, not tensors", "Save the network's state_dict()."
    if "data.pkl" in has:
        is_named_so = path.suffix != ".safetensors"
        return ("", "") if is_named_so else ("a file of torch.save", "Rename it to .pth.")
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy arrays", _CONVERT
    return "a zip archive, not a file of torch.save", _UNPACK


def describe_folder(folder: Path) -> tuple[str, str]:
    """What a folder is that holds no ``model.safetensors``, and what to do."""
    names = sorted(each.name for each in folder.iterdir())
    if any(name.endswith(".distcp") for name in names):
        return "a distributed checkpoint of torch", (
            "Join it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pth"
        )
    if "adapter_config.json" in names or "adapter_model.safetensors" in names:
        return "a LoRA adapter, which changes another network's weights", (
            "Merge it into its network (peft: merge_and_unload) and save that."
        )
    if "job.json" in names:
        networks = [f"{folder}/teacher", f"{folder}/students/NAME"]
        return "a run folder of distill", f"Give one network of it: {' or '.join(networks)}."
    if {"saved_model.pb", "tf_model.h5", "flax_model.msgpack"} & set(names):
        return "a TensorFlow or Flax model", _CONVERT
    files = [name for name in names if name.endswith((".safetensors", ".pth", ".pt", ".bin"))]
    if files:
        return f"no model.safetensors, but {', '.join(files[:3])}", "Name the file itself."
    counts = Counter(Path(name).suffix.lower() or "without suffix" for name in names)
    held = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(4))
    return f"no weights in it ({held or 'it is empty'})", _OURS
