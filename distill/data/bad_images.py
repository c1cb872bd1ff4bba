"""What is wrong with an encoded image, found before the decoder meets it.

One broken image makes a DALI pipeline unusable without saying which it was. So each image's header is read
first (about 30 us), and its end: what was cut off has none. An image that still cannot be decoded is found by
decoding the batch one by one.
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from distill.data.locations import Location, Reader

MAX_MEGAPIXELS = 64.0
MAX_ASPECT = 1000  # longer side over shorter; more is a line, and a crop of it holds no information
FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP", "BMP"})  # MPO: a JPEG with more behind it
EXIF_ORIENTATION = 0x0112
ROTATED = frozenset({5, 6, 7, 8})  # EXIF orientations that swap height and width
JPEG_END, PNG_END = b"\xff\xd9", b"IEND"
TAIL = 4096  # bytes in which the end of an image must lie; some writers append to it


def measure(
    reader: Reader, location: Location, max_megapixels: float, is_full: bool
) -> tuple[int, int] | str:
    """Height and width after EXIF rotation, or what is wrong; ``is_full`` decodes every pixel."""
    try:
        encoded = reader.read(location)
    except OSError as error:
        return _reason(error)
    return examine(encoded, max_megapixels, is_full=is_full)


def find_fault(
    encoded: NDArray[np.uint8], hw: tuple[int, int], max_megapixels: float
) -> str | None:
    """Why an image must not reach the decoder, or None; ``hw`` is its size in the index."""
    size = examine(encoded, max_megapixels, is_full=False)
    if isinstance(size, str):
        return size
    if size != hw:
        return f"is {size[1]} x {size[0]} px now, was {hw[1]} x {hw[0]} when it was indexed"
    return None


def examine(
    encoded: NDArray[np.uint8], max_megapixels: float, *, is_full: bool
) -> tuple[int, int] | str:
    """Height and width, or what is wrong with the header, the end or, if ``is_full``, any pixel."""
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "truncated images must be errors here"
    if not len(encoded):
        return "empty file"
    try:
        with Image.open(io.BytesIO(encoded.data)) as image:
            width, height = image.size
            fault = _header_fault(image, width, height, max_megapixels)
            if fault:
                return fault
            if is_full or not _has_end(encoded, str(image.format)):
                image.load()
            orientation = _orientation(image)
    except Exception as error:  # Pillow raises whatever its decoders raise
        return _reason(error)
    return (width, height) if orientation in ROTATED else (height, width)


def name_format(encoded: NDArray[np.uint8]) -> str:
    """What kind of image it is, by its first bytes; empty when it is none."""
    try:
        with Image.open(io.BytesIO(encoded.data)) as image:
            return str(image.format)
    except Exception:  # Pillow raises whatever its decoders raise
        return ""


def to_bitmap(encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image as Pillow decodes it, upright in RGB, as a bitmap that every decoder can read.

    For the few that DALI 2.4 cannot decode though they are intact, such as WebP files with an EXIF block it does not parse.
    """
    with Image.open(io.BytesIO(encoded.data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    bitmap = io.BytesIO()
    upright.save(bitmap, "BMP")
    return np.frombuffer(bitmap.getvalue(), np.uint8)


def _header_fault(image: Any, width: int, height: int, max_megapixels: float) -> str:
    if image.format not in FORMATS:
        return f"{image.format} images are not read here"
    if width * height > max_megapixels * 1e6:
        size = f"{width} x {height} px, {width * height / 1e6:.1f} megapixels"
        return f"{size}: more than data.max_megapixels = {max_megapixels:g}"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return f"{width} x {height} px: a line, not an image"
    return ""


def _orientation(image: Any) -> int:
    """From the header alone: Pillow would decode all of a PNG to look for it behind the pixels."""
    if "exif" not in image.info:
        return 1
    return int(image.getexif().get(EXIF_ORIENTATION, 1))


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


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "may not be read"
    if "cannot identify image file" in str(error):
        return "not an image"
    return (str(error).splitlines() or [""])[0].strip() or type(error).__name__
