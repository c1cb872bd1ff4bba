"""Micro-batches of networks that ran out of memory: half as many images from the next start on, with the same gradient.

    micro_batches/<name>.json    written by the rank that ran out of memory, read at every start

The start of new processes frees all that the failed step held: engine, buckets, frames, cached blocks. Below
one KoLeo group the class tokens of the slice are computed once more, before its parts, and each part gets its
rows of KoLeo's gradient: the neighbours in a part of a group would be others, and so would be the gradient.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from distill.runfolder.status import write_json
from teacher.shapes import KOLEO_GROUP

UNLIMITED = 2**62


def smaller_part(images: int, least: int) -> int | None:
    """Half of a micro-batch, in full KoLeo groups where it holds more than one; None where it holds no more than ``least``."""
    if images <= least:
        return None
    if images <= KOLEO_GROUP:
        return max(least, images // 2)
    return max(1, images // 2 // KOLEO_GROUP) * KOLEO_GROUP


def write_micro_batch(run_folder: Path, name: str, images: int) -> None:
    """Limits a network's micro-batches from the next start on."""
    path = _file(run_folder, name)
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"images": images})


def agreed_micro_batches(
    run_folder: Path, names: Sequence[str], control: dist.ProcessGroup
) -> dict[str, int]:
    """The limits of networks that ran out of memory before, the same on every rank. One all-reduce over ``control``, a gloo group of the world."""
    limits = torch.tensor([_read(_file(run_folder, name)) for name in names], dtype=torch.int64)
    dist.all_reduce(limits, op=dist.ReduceOp.MIN, group=control)
    pairs = zip(names, limits.tolist(), strict=True)
    return {name: images for name, images in pairs if images < UNLIMITED}


def _read(path: Path) -> int:
    return int(json.loads(path.read_text())["images"]) if path.is_file() else UNLIMITED


def _file(run_folder: Path, name: str) -> Path:
    return run_folder / "micro_batches" / f"{name}.json"
