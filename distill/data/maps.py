"""A map beside a picture to an array: the class of every pixel, or its depth.

masks   PNG, grey or with a palette, of 1 to 16 bits: the stored index, never a colour
depth   NPY in metres, or 16-bit PNG in levels of ``metres``; 0, below 0 and not finite: not measured
"""

import io

import numpy as np
from jaxtyping import Float32, Int64
from numpy.typing import NDArray
from PIL import Image

from distill.listing.decode import OF_CLEAR_SAMPLE, UndecodableError, raw_mode, reason_of, stream_of

NPY = b"\x93NUMPY"


def decode_mask(encoded: NDArray[np.uint8]) -> Int64[np.ndarray, "height width"]:
    """The class of every pixel as it is stored.

    Raises:
        UndecodableError: it is no PNG of indices.
    """
    values, mode, scale = _decode_png(encoded)
    if values.ndim != 2:
        raise UndecodableError(
            f"is a picture of colours ({mode}); classes are grey levels or a palette"
        )
    return values.astype(np.int64) // scale


def decode_depth(encoded: NDArray[np.uint8], metres: float) -> Float32[np.ndarray, "height width"]:
    """Depth of every pixel in metres, 0 where it was not measured. ``metres``: of one level of a PNG.

    Raises:
        UndecodableError: it is no NPY of numbers and no 16-bit PNG.
    """
    if encoded[: len(NPY)].tobytes() == NPY:
        try:
            values = np.load(io.BytesIO(encoded.tobytes()), allow_pickle=False).squeeze()
            depth = values.astype(np.float32)
        except Exception as error:  # a header that is damaged raises whatever its parser raises
            raise UndecodableError(reason_of(error)) from error
    else:
        values, mode, _ = _decode_png(encoded)
        if not mode.startswith("I"):
            raise UndecodableError(f"is a PNG of mode {mode}; depth is 16-bit grey")
        depth = values.astype(np.float32) * np.float32(metres)
    if depth.ndim != 2:
        raise UndecodableError(f"has the shape {list(values.shape)}, not height and width")
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def _decode_png(encoded: NDArray[np.uint8]) -> tuple[NDArray[np.generic], str, int]:
    """Samples, mode, and what Pillow multiplied them by."""
    try:
        with Image.open(stream_of(encoded), formats=("PNG",)) as image:
            scale = OF_CLEAR_SAMPLE.get(raw_mode(image), 1)
            return np.asarray(image), image.mode, scale
    except Exception as error:  # Pillow raises whatever its decoders raise
        raise UndecodableError(reason_of(error)) from error
