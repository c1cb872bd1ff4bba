"""What is wrong with an encoded image, found before the decoder meets it.

One broken image makes a DALI pipeline unusable without saying which it was. So each image's header is read
first (about 30 us), and its end: what was cut off has none. An image that still cannot be decoded is found by
decoding the batch one by one.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from distill.data.locations import Location, Reader
from distill.listing.decode import SWAPPING, reason_of, stream_of
from distill.listing.headers import Decoder, look

MAX_MEGAPIXELS = 64.0
MAX_ASPECT = 1000  # longer side over shorter; more is a line, and a crop of it holds no information
FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB"})  # MPO: a JPEG with more behind it
# by the first bytes: Pillow tries its parsers one after the other otherwise, which takes a fifth of the time
KINDS = {b"\xff\xd8\xff": ("JPEG",), b"\x89PN": ("PNG",)}
JPEG_END, PNG_END = b"\xff\xd9", b"IEND"
TAIL = 4096  # bytes in which the end of an image must lie; some writers append to it


class Header(NamedTuple):
    """Height and width of the upright image, and who decodes it, from the header of a good image."""

    hw: tuple[int, int]
    decoder: Decoder


def measure(
    reader: Reader, location: Location, max_megapixels: float, is_full: bool
) -> Header | str:
    """What the index holds of an image, or what is wrong with it; ``is_full`` decodes every pixel."""
    try:
        encoded = reader.read(location)
    except OSError as error:
        return reason_of(error)
    return examine(encoded, max_megapixels, is_full=is_full)


def find_fault(header: Header | str, hw: tuple[int, int]) -> str | None:
    """Why an image must not reach the decoder, or None; ``hw`` is its size in the index."""
    if isinstance(header, str):
        return header
    if header.hw != hw:
        (height, width), (was_height, was_width) = header.hw, hw
        return f"is {width} x {height} px now, was {was_width} x {was_height} when it was indexed"
    return None


def examine(encoded: NDArray[np.uint8], max_megapixels: float, *, is_full: bool) -> Header | str:
    """The header's facts, or what is wrong with it, the end or, if ``is_full``, any pixel."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "truncated images must be errors here"
    if not len(encoded):
        return "empty file"
    try:
        kinds = KINDS.get(encoded[:3].tobytes())
        with Image.open(stream_of(encoded), formats=kinds) as image:
            width, height = image.size
            fault = _header_fault(image, width, height, max_megapixels)
            if fault:
                return fault
            if is_full or not _has_end(encoded, str(image.format)):
                image.load()
            decoder, orientation = look(encoded.data, image)
    except Exception as error:  # Pillow raises whatever its decoders raise
        return reason_of(error)
    return Header((width, height) if orientation in SWAPPING else (height, width), decoder)


def name_format(encoded: NDArray[np.uint8]) -> str:
    """What kind of image it is, by its first bytes; empty when it is none."""
    try:
        with Image.open(stream_of(encoded)) as image:
            return str(image.format)
    except Exception:  # Pillow raises whatever its decoders raise
        return ""


def _header_fault(image: Any, width: int, height: int, max_megapixels: float) -> str:
    if image.format not in FORMATS:
        return f"{image.format} images are not read here"
    if width * height > max_megapixels * 1e6:
        size = f"{width} x {height} px, {width * height / 1e6:.1f} megapixels"
        return f"{size}: more than data.max_megapixels = {max_megapixels:g}"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width} x {height} px: a line, not an image"
    return ""


def _has_end(encoded: NDArray[np.uint8], kind: str) -> bool:
    """The image's last bytes are there; where that is not sure, it is to be decoded to find out."""
    tail = encoded[-TAIL:].tobytes()
    if kind in ("JPEG", "MPO"):
        return JPEG_END in tail
    if kind == "PNG":
        return PNG_END in tail
    if kind == "WEBP":
        stated = int.from_bytes(encoded[4:8].tobytes(), "little") + 8
        return len(encoded) >= stated
    return False
