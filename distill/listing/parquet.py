"""Rows of Parquet files: the column of images, the column of labels. Needs pyarrow."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distill.errors import DataError
from distill.listing.labels import clean_label
from distill.listing.locations import Kind, Location, image_field
from distill.listing.passed_over import PassedOver

LABEL = "label"  # the column


def list_rows(path: Path, passed_over: PassedOver) -> Iterator[tuple[Location, str]]:
    """Every row and its label, empty where it has none.

    Raises:
        DataError: pyarrow is missing.
        OSError: the file is damaged, or it is not clear which column holds the images.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"data.sources: {path} needs pyarrow",
            fix="pip install pyarrow, or pack it into shards elsewhere.",
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        image_field(file.schema_arrow)
        has_labels = _has_labels(file.schema_arrow, path, passed_over)
        is_minus_one_none = _is_class_label(file.schema_arrow)
        for group in range(file.num_row_groups):
            labels = [""] * file.metadata.row_group(group).num_rows
            if has_labels:
                column = file.read_row_group(group, columns=[LABEL]).column(0).to_pylist()
                labels = [_label(value, is_minus_one_none) for value in column]
            for row, label in enumerate(labels):
                yield Location(Kind.PARQUET, str(path), f"{group}/{row}", group, row), label
    except pyarrow.ArrowException as error:
        raise OSError(str(error).splitlines()[0]) from error


def _has_labels(schema: Any, path: Path, passed_over: PassedOver) -> bool:
    import pyarrow.types as types

    if LABEL not in schema.names:
        return False
    kind = schema.field(LABEL).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    scalars = (
        types.is_integer,
        types.is_floating,
        types.is_boolean,
        types.is_string,
        types.is_large_string,
    )
    if any(is_kind(value) for is_kind in scalars):
        return True
    if not types.is_null(value):
        what = str(kind).partition("<")[0]
        passed_over.remarks.append(f"{path}: column {LABEL!r} is of type {what}: no labels")
    return False


def _is_class_label(schema: Any) -> bool:
    """Hugging Face's ``ClassLabel``, of which -1 stands for none."""
    metadata: dict[bytes, bytes] = schema.metadata or {}
    return b"ClassLabel" in metadata.get(b"huggingface", b"")


def _label(value: Any, is_minus_one_none: bool) -> str:
    if value is None or (is_minus_one_none and value == -1):
        return ""
    if isinstance(value, float):  # numbers with gaps, as pandas writes them
        return "" if math.isnan(value) else f"{value:.0f}" if value == round(value) else str(value)
    return clean_label(str(value))
