"""Embeds the images of some sources with one network, on one rank or on several.

A shard is of one rank, batch by batch, so that its bytes are the same on any number of ranks and after any stop.
The first rank lists the images and names the shards that are missing; only that is exchanged.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16, UInt8
from torch import Tensor, nn

from distill.curation.embeddings import (
    META,
    Features,
    Meta,
    StoredEmbeddings,
    read_meta,
    shard_path,
)
from distill.curation.rows import write_array
from distill.data.build_index import build_index
from distill.data.file_sizes import file_bytes, refuse_changed
from distill.data.index import ImageIndex
from distill.data.locations import Location, Reader
from distill.engine.device import cores_of_rank
from distill.errors import DataError, UserError
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
from distill.protocols.sharing import ALONE, Sharing
from distill.runfolder.files import make_folder
from distill.runfolder.status import write_json
from distill.weights.load import load_backbone

MOST_BROKEN = 0.01  # of the images, as in a recipe
SHARDS = 1024  # of a heap, as far as these allow
FEWEST_ROWS, MOST_ROWS = BATCH, 256 * BATCH
BATCHES_AHEAD = 8  # of pixels in memory
log = logging.getLogger(__name__)
Say = Callable[[str], None]


@dataclass(frozen=True)
class EmbedRequest:
    """What to embed, with what, and where to.

    Args:
        sources: folders, shards, lists or tables, as a recipe names them.
        network: an exported folder, a file of weights or ``RUN:NAME``.
        folder: where embeddings lie; all ranks see it.
        size: side of the images in px; None as the network's files state.
        features: of a row.
    """

    sources: tuple[Path, ...]
    network: Path
    folder: Path
    size: int | None = None
    features: Features = "class"


def embed_on_rank(
    request: EmbedRequest, say: Say, device: torch.device, sharing: Sharing
) -> dict[str, Any]:
    """Returns the facts of the embeddings, as ``embed``, and this call's images a second."""
    began_s = time.monotonic()
    done = embed(request, say, device, sharing)
    elapsed_s = time.monotonic() - began_s
    found = StoredEmbeddings.open(request.folder)
    usable = int(found.usable().sum()) if sharing.is_first else 0
    return {
        **asdict(found.meta),
        "usable": usable,
        "embedded_now": done,
        "images_per_s": round(done / elapsed_s, 1),
    }


def embed(request: EmbedRequest, say: Say, device: torch.device, sharing: Sharing = ALONE) -> int:
    """Embeds all images of some sources, or goes on with the shards that are missing.

    Args:
        request: what to embed.
        say: gets what is next, and the minutes left.
        device: where the network of this rank runs.
        sharing: this rank among those that embed. Collective: two gathers.

    Returns:
        The images that this call embedded, on all ranks.

    Raises:
        DataError: the folder has other embeddings, sources have changed, or the network gives no finite numbers.
        UserError: images or weights cannot be read.
    """
    network = _network(request.network, request.size, say)
    backbone, _ = load_backbone(network.path, spec=network.spec, device=device)
    todo = _prepared(request, network, backbone, say, sharing)
    meta = read_meta(request.folder)
    if meta is None:
        raise DataError(
            f"{request.folder}: rank {sharing.rank} does not see what rank 0 wrote there",
            fix="Choose a folder with -o that all nodes share.",
        )
    index = ImageIndex.load(request.folder / INDEX_FOLDER)
    mine = todo[sharing.rank :: sharing.num_ranks]
    total = sum(len(meta.rows_of(shard)) for shard in todo)
    counted = count_images(say if sharing.is_first else _nothing, "embedding", total)
    for shard in mine:
        locations = [index.location(image) for image in meta.rows_of(shard)]
        rows = _rows(
            backbone,
            network,
            locations,
            device,
            request.features,
            lambda count: counted(count * sharing.num_ranks),
        )
        write_array(shard_path(request.folder, shard), rows)
    sharing.gathered(None)  # all shards are there
    return total


def _nothing(_: str) -> None:
    """What other ranks say."""


def _prepared(
    request: EmbedRequest, network: Network, backbone: nn.Module, say: Say, sharing: Sharing
) -> list[int]:
    """The shards that are missing, by the first rank, which lists the images at the first call."""
    answer: list[int] | UserError = []
    if sharing.is_first:
        try:
            answer = _prepare(request, network, backbone, say)
        except UserError as error:
            answer = error
    is_refused = isinstance(answer, UserError)
    shards, has_failed = sharing.gathered(([] if is_refused else answer, is_refused))[0]
    if isinstance(answer, UserError):
        raise answer
    if has_failed:
        raise SystemExit(DataError.exit_code)  # the first rank reports why
    return list(shards)


def _prepare(request: EmbedRequest, network: Network, backbone: nn.Module, say: Say) -> list[int]:
    folder = request.folder
    named = tuple(str(source.absolute()) for source in request.sources)
    wanted = Meta(
        network=network.name,
        weights=fingerprint(backbone.state_dict())[:16],
        size=network.preparation.size,
        features=request.features,
        width=int(backbone.width) * len(request.features.split("+")),  # type: ignore[arg-type]
        rows=0,
        shard_rows=0,
        images="",
        sources=named,
    )
    meta = read_meta(folder)
    if meta is None:
        say("listing images")
        index = build_index(request.sources, max_bad_fraction=MOST_BROKEN)
        index = replace(index, file_bytes=file_bytes(index))
        rows = len(index)
        meta = replace(wanted, rows=rows, shard_rows=shard_rows(rows), images=index.fingerprint)
        make_folder(folder)
        index.save(folder / INDEX_FOLDER)
        write_json(folder / META, asdict(meta))
    else:
        _require_same(folder, meta, wanted)
        fix = "Bring back what it was, or embed into another folder."
        refuse_changed(ImageIndex.load(folder / INDEX_FOLDER), folder, fix)
    return [shard for shard in range(meta.num_shards) if not shard_path(folder, shard).is_file()]


def shard_rows(num_rows: int) -> int:
    """Rows of a shard: full batches, for about ``SHARDS`` shards; a stop loses at most one of each rank."""
    batches = -(-num_rows // (SHARDS * BATCH))
    return min(max(batches * BATCH, FEWEST_ROWS), MOST_ROWS)


def _network(path: Path, size: int | None, say: Say) -> Network:
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


def _require_same(folder: Path, before: Meta, wanted: Meta) -> None:
    for name, option in (
        ("weights", "weights"),
        ("size", "--size"),
        ("features", "--features"),
        ("sources", "sources"),
    ):
        if getattr(before, name) != getattr(wanted, name):
            raise DataError(
                f"{folder}: has embeddings with other {option} ({before.network}, {before.size} px, {before.features})",
                fix="Choose another folder with -o, or remove this one.",
            )


def _rows(
    backbone: nn.Module,
    network: Network,
    locations: Sequence[Location],
    device: torch.device,
    features: Features,
    on_batch: Callable[[int], None],
) -> Float16[np.ndarray, "images width"]:
    """Features of some images; zeros for those that cannot be used, which a warning names.

    Raises:
        DataError: a feature is no number that fp16 holds.
    """
    pixels = _Pixels(locations, network.preparation)
    found = extract_all(
        backbone,
        pixels.batches(),
        network.preparation,
        device=device,
        dtype=scoring_dtype(network.spec.parameters, device),
        on_batch=on_batch,
    )
    parts = [found.class_token] if features == "class" else [found.class_token, found.mean_patch]
    rows: np.ndarray = torch.cat(parts, 1).half().numpy()
    rows[pixels.broken] = 0.0
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(bad):
        raise DataError(
            f"{network.name}: the features of {locations[bad[0]]} are not finite in fp16; "
            f"those of {len(bad):,} of {len(rows):,} images of a shard are not",
            fix="Take another network, or check the weights of this one: distill weights inspect.",
        )
    return rows


class _Pixels:
    """Images as a network wants them; ``broken``: those that could not be used, which are black."""

    def __init__(self, locations: Sequence[Location], preparation: Preparation) -> None:
        self.broken: list[int] = []
        self._locations, self._preparation = locations, preparation
        self._reader = Reader(limit_s=PICTURE_LIMIT_S)

    def batches(self) -> Iterator[UInt8[Tensor, "batch 3 side side"]]:
        """Full batches as far as they go; files are decoded while the network runs."""
        images = range(len(self._locations))
        for start in range(0, len(images), BATCHES_AHEAD * BATCH):
            ahead = images[start : start + BATCHES_AHEAD * BATCH]
            pixels = in_order(self._pixels, ahead, max(READERS, cores_of_rank()))
            for begin in range(0, len(ahead), BATCH):
                yield torch.stack([next(pixels) for _ in ahead[begin : begin + BATCH]])

    def _pixels(self, image: int) -> UInt8[Tensor, "3 side side"]:
        location, size = self._locations[image], self._preparation.size
        try:
            return resized(read_pixels(self._reader, location, self._preparation.background), size)
        except OSError as error:
            log.warning("%s: has a row of zeros, cannot be used (%s)", location, reason_of(error))
            self.broken.append(image)
            return torch.zeros(3, size, size, dtype=torch.uint8)
