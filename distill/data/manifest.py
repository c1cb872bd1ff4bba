"""A manifest: a Parquet file that names images where they lie, with what else is known of them; a source that brings its index.

    source, member             file, shard or table that holds the image, or the folder of the file; the name there
    kind, offset, length       as in ``distill.listing.locations``
    height, width, decoder     of the header;  label, held_out;  bytes of the file, by which a change is noticed
    weight                     how often it is one of the images; 0 for those that are not
    keep, reason, ...          what people read; training does not

Needs pyarrow.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from distill.data.index import ImageIndex, make_index
from distill.errors import DataError
from distill.listing.headers import Decoder
from distill.listing.locations import Kind, Location
from distill.listing.sources import Found
from distill.runfolder.files import make_folder, replaced

MARK, FORMAT = b"distill.manifest", b"1"  # in the metadata of the file
WEIGHT = "weight"
NEEDED = ("source", "member", "kind", "offset", "length", "height", "width", "decoder", "label")


def write_manifest(
    path: Path,
    index: ImageIndex,
    weights: Int64[np.ndarray, " images"],
    columns: Mapping[str, Any],
    facts: str,
) -> None:
    """Writes a row for each image of an index, with more columns; ``facts`` go into the metadata.

    Raises:
        DataError: pyarrow is missing, or a name is not UTF-8.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow", fix="pip install pyarrow.") from error
    rows = range(len(index))
    locations = [index.location(row) for row in rows]
    names = (*index.class_names, None)
    basic = {
        "source": [each.container for each in locations],
        "member": [each.name for each in locations],
        "kind": np.array([int(each.kind) for each in locations], np.int8),
        "offset": [each.offset for each in locations],
        "length": [each.length for each in locations],
        "height": index.hw[:, 0],
        "width": index.hw[:, 1],
        "decoder": np.array([int(index.decoder(row)) for row in rows], np.int8),
        "label": [None if index.labels is None else names[index.labels[row]] for row in rows],
        "held_out": np.zeros(len(index), bool) if index.held_out is None else index.held_out,
        "bytes": [None] * len(index) if index.file_bytes is None else index.file_bytes,
        "keep": weights > 0,
        WEIGHT: weights,
    }
    types = {"label": pyarrow.string(), "bytes": pyarrow.int64()}
    try:
        arrays = {
            name: pyarrow.array(values, types.get(name))
            for name, values in {**basic, **columns}.items()
        }
    except UnicodeError as error:
        raise DataError(
            f"{path}: a name that is not UTF-8 ({error.object!r})",  # type: ignore[attr-defined]
            fix="Rename the file, or train on the folder of the choice.",
        ) from error
    table = pyarrow.table(arrays).replace_schema_metadata({MARK: FORMAT, b"facts": facts})
    make_folder(path.parent)
    with replaced(path) as aside:
        pyarrow.parquet.write_table(table, aside)


def read_manifest(path: Path) -> ImageIndex | None:
    """The index of the images with a weight, repeated as often; None where the file is no manifest, or without pyarrow.

    Raises:
        DataError: it is of another format, or names no image.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return None
    try:
        found = (pyarrow.parquet.read_schema(path).metadata or {}).get(MARK)
        if found is None:
            return None
        if found != FORMAT:
            raise OSError(f"format {found.decode()}, this version reads {FORMAT.decode()}")
        columns = [*NEEDED, "held_out", "bytes", WEIGHT]
        table = pyarrow.parquet.read_table(path, columns=columns).to_pydict()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            f"data.sources: {path}: {error}", fix="Write the manifest again."
        ) from error
    rows = [row for row, count in enumerate(table[WEIGHT]) for _ in range(count)]
    if not rows:
        raise DataError(
            f"data.sources: {path} keeps no image", fix="Choose some, and write it again."
        )
    some = [tuple(table[name][row] for name in NEEDED) for row in rows]
    index = make_index(
        [
            Found(Location(Kind(kind), source, member, offset, length), label or "", held_out)
            for (source, member, kind, offset, length, *_, label), held_out in zip(
                some, (table["held_out"][row] for row in rows), strict=True
            )
        ],
        [(height, width) for *_, height, width, _, _ in some],
        ((str(path), len(rows)),),
        [Decoder(decoder) for *_, decoder, _ in some],
    )
    sizes = [table["bytes"][row] for row in rows]
    return index if None in sizes else replace(index, file_bytes=np.array(sizes, np.int64))
