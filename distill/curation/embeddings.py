"""Embeddings of images in a folder: class features of one network, row by row with the index of the images.

    meta.json                 network, side in px, rows, width, fingerprints
    index/                    the images (``distill.data.index``): image i is row i
    class-00000.npy, ...      SHARD_ROWS rows each, fp16; a picture that cannot be used has a row of zeros

A shard gets its name when it is complete, so the same command goes on after a kill.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from distill.curation.rows import write_array
from distill.data.build_index import build_index
from distill.data.index import ImageIndex
from distill.data.locations import Location, Reader
from distill.errors import DataError
from distill.evaluate.files import named_networks, network_of
from distill.evaluate.scoring import Network
from distill.export.save import fingerprint
from distill.listing.decode import reason_of
from distill.listing.limit import in_order
from distill.listing.sources import INDEX_FOLDER
from distill.protocols.images import (
    BATCH,
    PICTURE_LIMIT_S,
    READERS,
    Preparation,
    count_images,
    extract_all,
    read_pixels,
    resized,
    scoring_dtype,
)
from distill.runfolder.files import make_folder
from distill.runfolder.status import write_json
from distill.weights.load import load_backbone

META = "meta.json"
FORMAT = 1
SHARD_ROWS = 4096
MOST_BROKEN = 0.01  # of the images, as in a recipe
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Meta:
    """What embeddings are of: a network by the fingerprint of its weights, images by that of their index."""

    network: str
    weights: str
    size: int
    width: int
    rows: int
    images: str
    sources: tuple[str, ...]
    format: int = FORMAT


@dataclass(frozen=True)
class StoredEmbeddings:
    """Complete embeddings, read from disk; satisfies ``Vectors``."""

    folder: Path
    meta: Meta
    index: ImageIndex
    _shards: tuple[np.ndarray, ...] = field(repr=False)

    @staticmethod
    def open(folder: Path) -> "StoredEmbeddings":
        """Maps a folder into memory.

        Raises:
            DataError: it holds no embeddings, or not all of them yet.
        """
        meta = read_meta(folder)
        if meta is None:
            fix = "Make them: distill data embed SRC -o FOLDER --with NETWORK."
            raise DataError(f"{folder}: no embeddings", fix=fix)
        missing = [path for path, _ in _shards_of(folder, meta) if not path.is_file()]
        if missing:
            raise DataError(
                f"{folder}: {missing[0].name} is missing, embeddings are not complete",
                fix="Run the same distill data embed again, which goes on.",
            )
        try:
            shards = tuple(
                np.load(path, mmap_mode="r", allow_pickle=False)
                for path, _ in _shards_of(folder, meta)
            )
        except (OSError, EOFError, ValueError) as error:
            raise DataError(
                f"{folder}: a shard cannot be read ({error})", fix="Remove it, and embed again."
            ) from error
        for shard, (path, rows) in zip(shards, _shards_of(folder, meta), strict=True):
            if (shard.shape, shard.dtype) != ((len(rows), meta.width), np.float16):
                raise DataError(
                    f"{path}: {shard.dtype} numbers of shape {shard.shape}, not float16 of {(len(rows), meta.width)}",
                    fix="Remove it, and embed again.",
                )
        return StoredEmbeddings(folder, meta, ImageIndex.load(folder / INDEX_FOLDER), shards)

    @property
    def num_rows(self) -> int:
        """Images."""
        return self.meta.rows

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self.meta.width

    def block(self, begin: int, end: int) -> Float[Tensor, "rows width"]:
        """Rows from ``begin`` to before ``end`` in fp32, as the network gave them."""
        parts = []
        for shard in range(begin // SHARD_ROWS, -(-end // SHARD_ROWS)):
            first = shard * SHARD_ROWS
            part = self._shards[shard][max(begin - first, 0) : end - first]
            parts.append(torch.from_numpy(part.astype(np.float32)))
        return torch.cat(parts) if parts else torch.zeros(0, self.width)

    def usable(self) -> Bool[np.ndarray, " images"]:
        """Images with features: those that could be decoded."""
        found = [np.abs(shard).max(axis=1, initial=0) > 0 for shard in self._shards]
        return np.concatenate(found) if found else np.zeros(0, np.bool_)


def read_meta(folder: Path) -> Meta | None:
    """What a folder holds embeddings of; None where it holds none.

    Raises:
        DataError: the file is damaged, or of another format.
    """
    path = folder / META
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}, this version reads {FORMAT}")
        return Meta(**{**values, "sources": tuple(values["sources"])})
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path}: cannot be read ({error})", fix="Remove the folder, and embed again."
        ) from error


def embed(
    sources: Sequence[Path],
    network: Path,
    folder: Path,
    say: Callable[[str], None],
    *,
    size: int | None = None,
    device: torch.device,
) -> StoredEmbeddings:
    """Embeds all images of some sources, or goes on with those that are missing.

    Args:
        sources: folders, shards, lists or tables, as a recipe names them.
        network: an exported folder, a file of weights or ``RUN:NAME``.
        folder: where embeddings lie.
        say: gets what is next, and the minutes left.
        size: side of the images in px; by default what the network's files state.
        device: where the network runs.

    Raises:
        DataError: the folder has embeddings of other images or by another network.
        UserError: images or weights cannot be read.
    """
    scored = _network(network, size, say)
    backbone, _ = load_backbone(scored.path, spec=scored.spec, device=device)
    weights = fingerprint(backbone.state_dict())[:16]
    before = read_meta(folder)
    named = tuple(str(source.absolute()) for source in sources)
    if before is not None:
        _require_same(folder, before, (weights, scored.preparation.size, named))
        index = ImageIndex.load(folder / INDEX_FOLDER)
        meta = before
    else:
        say("listing images")
        index = build_index(sources, max_bad_fraction=MOST_BROKEN)
        width = int(backbone.width)  # type: ignore[arg-type]
        size_px = scored.preparation.size
        meta = Meta(scored.name, weights, size_px, width, len(index), index.fingerprint, named)
        make_folder(folder)
        index.save(folder / INDEX_FOLDER)
        write_json(folder / META, asdict(meta))
    todo = [(p, rows) for p, rows in _shards_of(folder, meta) if not p.is_file()]
    on_batch = count_images(say, "embedding", sum(map(len, (rows for _, rows in todo))))
    for path, rows in todo:
        locations = [index.location(image) for image in rows]
        features = _features(backbone, scored, locations, device, on_batch)
        write_array(path, features.numpy().astype(np.float16))
    return StoredEmbeddings.open(folder)


def _network(path: Path, size: int | None, say: Callable[[str], None]) -> Network:
    """The one network of a path, with the side that is wanted."""
    found = named_networks([path])
    if len(found) != 1:
        names = ", ".join(name for name, _, _ in found)
        raise DataError(f"{path}: has {names}", fix=f"Name one: --with {path}:NAME.")
    network = network_of(*found[0], say)
    stated = network.preparation
    side = size or stated.size
    if side % network.spec.stride:
        stride = network.spec.stride
        raise DataError(
            f"--size {side}: not a multiple of {stride}, the stride of {network.name}",
            fix=f"Write --size {max(1, side // stride) * stride}.",
        )
    preparation = Preparation(side, stated.mean, stated.std, stated.background)
    return Network(network.name, network.path, network.spec, preparation)


def _require_same(folder: Path, before: Meta, wanted: tuple[str, int, tuple[str, ...]]) -> None:
    found = before.weights, before.size, before.sources
    if found != wanted:
        names = ("weights", "--size", "sources")
        other = next(n for n, a, b in zip(names, found, wanted, strict=True) if a != b)
        raise DataError(
            f"{folder}: has embeddings with other {other} ({before.network}, {before.size} px)",
            fix="Choose another folder with -o, or remove this one.",
        )


def _shards_of(folder: Path, meta: Meta) -> Iterator[tuple[Path, range]]:
    for first in range(0, meta.rows, SHARD_ROWS):
        name = f"class-{first // SHARD_ROWS:05d}.npy"
        yield folder / name, range(first, min(first + SHARD_ROWS, meta.rows))


def _features(
    backbone: nn.Module,
    network: Network,
    locations: Sequence[Location],
    device: torch.device,
    on_batch: Callable[[int], None],
) -> Float[Tensor, "images width"]:
    """Class features of some images; zeros for those that cannot be used, which a warning names."""
    preparation = network.preparation
    reader, broken = Reader(limit_s=PICTURE_LIMIT_S), list[int]()

    def pixels(image: int) -> UInt8[Tensor, "3 side side"]:
        location = locations[image]
        try:
            return resized(read_pixels(reader, location, preparation.background), preparation.size)
        except OSError as error:
            log.warning("%s: has a row of zeros, cannot be used (%s)", location, reason_of(error))
            broken.append(image)
            return torch.zeros(3, preparation.size, preparation.size, dtype=torch.uint8)

    def batches() -> Iterator[UInt8[Tensor, "batch 3 side side"]]:
        for start in range(0, len(locations), BATCH):
            images = range(start, min(start + BATCH, len(locations)))
            yield torch.stack(list(in_order(pixels, images, READERS)))

    dtype = scoring_dtype(network.spec.parameters, device)
    found = extract_all(
        backbone, batches(), preparation, device=device, dtype=dtype, on_batch=on_batch
    )
    is_usable = torch.ones(len(locations), 1)
    is_usable[broken] = 0.0
    return found.class_token * is_usable
