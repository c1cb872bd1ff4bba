"""Tensors to the bytes of a safetensors file, and back.

Written here and not by the library so that a file is hashed while it is written, piece by piece
without a copy, and so that a full disk is an ``OSError`` with its cause.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distill.errors import CheckpointError

SUFFIX = ".safetensors"
ALIGNMENT = 8  # of the header and of the first tensor
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Of all tensors; the header adds a few per mille."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def header_of(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[str]]:
    """The head of the file, and the order in which the tensors follow: wide dtypes first, so that all are aligned."""
    assert sys.byteorder == "little", "the format is little-endian"
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        tensor = tensors[name]
        stop = start + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % ALIGNMENT)
    return len(header).to_bytes(8, "little") + header, order


def encode(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The file, piece by piece: header, then each host tensor as it lies in memory."""
    header, order = header_of(tensors)
    yield header
    for name in order:
        if tensors[name].numel():
            flat = tensors[name].detach().contiguous().flatten()
            yield flat.view(torch.uint8).numpy().data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error})",
            fix="Delete this checkpoint folder to go on from the one before it.",
        ) from error
