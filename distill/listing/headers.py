"""Which decoder an image's header allows: DALI where it is known to give Pillow's pixels, else Pillow.

The rule is a list of what is plain, so that a kind that was not thought of goes to the reference:

    JPEG    8 bits, grey or YCbCr of usual sampling, baseline or progressive; at most one EXIF block, whose orientation is written as in the standard
    PNG     grey, RGB or palette without clear pixels, frames, EXIF, XMP or EXIF as text
    WebP    a bare lossy or lossless picture without alpha
    BMP     24 bits, the usual header, from the bottom up

DALI has another parser of EXIF, and PNG files with two EXIF blocks end its process; hence the narrow gate.
``tests/distill/listing/test_decode.py`` compares both on some 600 pictures.
"""

import struct
from collections.abc import Callable
from enum import IntEnum

from PIL import Image

from distill.listing.decode import ORIENTATION, orientation_of

UNCLEAR = -1  # an orientation that readers may differ on
NO_ORIENTATION = 0
SHORT = 3  # type of an EXIF value
EXIF_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
}  # of a type
# texts and fractions among the tags that DALI reads, whatever it wants of them
TEXTS = dict.fromkeys((0x10E, 0x10F, 0x110, 0x131, 0x132, 0x8298), 2)
FRACTIONS = {0x11A: 1, 0x11B: 1, 0x13E: 2, 0x13F: 6, 0x211: 3, 0x214: 6}
TYPE_READ, COUNT_READ = TEXTS | dict.fromkeys(FRACTIONS, 5), FRACTIONS
SEGMENT = struct.Struct(">BBH")  # of a JPEG: 255, marker, length
# tables, restarts, comments, and what applications add but EXIF, XMP, JFIF and Adobe's
PASSED_OVER = frozenset({0xC4, 0xDB, 0xDD, 0xFE, 0xEF, *range(0xE2, 0xEE)})
SAMPLINGS = frozenset({0x11, 0x21, 0x22})  # of Y, over chroma of 1 x 1
PNG_DEPTHS = {0: (1, 2, 4, 8), 2: (8, 16), 3: (1, 2, 4, 8)}  # by colour type
PNG_ODD = frozenset({b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf"})
PNG_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})
TURNING_WORDS = (b"XML:com.adobe.xmp", b"Raw profile type", b"exif", b"xmp", b"transparency")
LONGEST_WORD = 79  # bytes of a text's name in a PNG
XMP, EXIF = b"http://ns.adobe.com/xap/1.0/\0", b"Exif\0\0"


class Decoder(IntEnum):
    """Who decodes an image; an index that was made before this was decided holds ``UNDECIDED``."""

    UNDECIDED = 0
    DALI = 1
    PILLOW = 2


def look(data: memoryview, image: Image.Image) -> tuple[Decoder, int]:
    """Who decodes an image, and its orientation, 1 to 8; ``image`` is opened from ``data``.

    Pixels are decoded only for a PNG with metadata that may stand behind them.
    """
    plain = PLAIN.get(str(image.format), _is_unknown)
    try:
        stated = plain(data)
    except (IndexError, struct.error):
        stated = UNCLEAR
    if stated in (NO_ORIENTATION, 1):
        return Decoder.DALI, 1
    if image.format == "PNG":
        if not _may_turn(data):
            return Decoder.PILLOW, 1
        image.load()  # what stands behind the pixels counts too
    orientation = orientation_of(image)
    return Decoder.DALI if stated == orientation else Decoder.PILLOW, orientation


def _is_unknown(_: memoryview) -> int:
    return UNCLEAR


def _jpeg(data: memoryview) -> int:
    """The orientation of a plain JPEG, ``NO_ORIENTATION`` or ``UNCLEAR``."""
    position, frame, exif = 2, b"", b""
    has_jfif = has_exif = has_xmp = False
    transform = 1
    unpack = SEGMENT.unpack_from
    while True:
        mark, marker, length = unpack(data, position)
        start, end = position + 4, position + 2 + length
        if mark != 0xFF or length < 2:
            return UNCLEAR
        if marker in PASSED_OVER:
            pass
        elif marker == 0xDA:
            break
        elif marker in (0xC0, 0xC2) and not frame:
            frame = bytes(data[start:end])
        elif marker == 0xE0:
            has_jfif = has_jfif or bytes(data[start : start + 5]) == b"JFIF\0"
        elif marker == 0xE1 and bytes(data[start : start + 6]) == EXIF:
            if has_exif:
                return UNCLEAR
            has_exif, exif = True, bytes(data[start + 6 : end])
        elif marker == 0xE1:
            is_xmp = bytes(data[start : start + len(XMP)]) == XMP
            has_xmp = has_xmp or (is_xmp and b"tiff:Orientation" in bytes(data[start:end]))
        elif marker == 0xEE and bytes(data[start : start + 5]) == b"Adobe":
            transform = data[start + 11]
        elif marker != 0xEE:
            return UNCLEAR
        position = end
    if transform != 1 or not _is_plain_frame(frame, has_jfif):
        return UNCLEAR
    stated = _exif_orientation(exif) if has_exif else NO_ORIENTATION
    return UNCLEAR if stated == NO_ORIENTATION and has_xmp else stated


def _is_plain_frame(frame: bytes, has_jfif: bool) -> bool:
    """Eight bits, a size, and one component or the usual three."""
    if len(frame) < 9 or frame[0] != 8 or 0 in struct.unpack(">HH", frame[1:5]):
        return False
    if frame[5] == 1:
        return len(frame) == 9
    if frame[5] != 3 or len(frame) != 15:
        return False
    ids, sampling = frame[6::3], frame[7::3]
    is_sampled = sampling[0] in SAMPLINGS and sampling[1:] == b"\x11\x11"
    return is_sampled and (has_jfif or ids == b"\1\2\3")


def _exif_orientation(tiff: bytes) -> int:
    """The orientation where it is written as in the standard, once; ``NO_ORIENTATION`` where it is not there."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 10:
        return UNCLEAR
    offset = struct.unpack_from(order + "I", tiff, 4)[0]
    if offset < 8 or offset + 2 > len(tiff):
        return UNCLEAR
    first = offset + 2
    last = first + 12 * struct.unpack_from(order + "H", tiff, offset)[0]
    if last > len(tiff):
        return UNCLEAR
    found = []
    for tag, kind, count, value in struct.iter_unpack(order + "HHII", tiff[first:last]):
        size = EXIF_BYTES.get(kind, 0) * count
        if not size or (size > 4 and not 8 <= value <= len(tiff) - size):
            return UNCLEAR  # where one value is not in the block, DALI reads none
        if TYPE_READ.get(tag, kind) != kind or COUNT_READ.get(tag, count) != count:
            return UNCLEAR  # nor where one of these is written otherwise: it looks at the tag alone
        if tag == ORIENTATION:
            found.append((kind, count, value & 0xFFFF if order == "<" else value >> 16))
    if not found:
        return NO_ORIENTATION
    kind, count, value = found[0]
    is_plain = len(found) == 1 and kind == SHORT and count == 1 and 1 <= value <= 8
    return value if is_plain else UNCLEAR


def _png(data: memoryview) -> int:
    length, name, _, _, depth, colour = struct.unpack_from(">I4sIIBB", data, 8)
    if (length, name) != (13, b"IHDR") or depth not in PNG_DEPTHS.get(colour, ()):
        return UNCLEAR
    for name, start, _ in _chunks(data):
        if name in PNG_ODD or (name in PNG_TEXT and _turns(data, start)):
            return UNCLEAR
        if name == b"IEND":
            return NO_ORIENTATION
    return UNCLEAR


def _may_turn(data: memoryview) -> bool:
    """A PNG has metadata that may hold an orientation."""
    try:
        return any(
            name == b"eXIf" or (name in PNG_TEXT and _turns(data, start))
            for name, start, _ in _chunks(data)
        )
    except struct.error:
        return True


def _chunks(data: memoryview) -> list[tuple[bytes, int, int]]:
    """Name, start and length of each chunk up to the end of a PNG.

    Raises:
        struct.error: the file ends before its last chunk.
    """
    position, found = 8, []
    while True:
        length, name = struct.unpack_from(">I4s", data, position)
        found.append((name, position + 8, length))
        if name == b"IEND":
            return found
        position += 12 + length


def _turns(data: memoryview, start: int) -> bool:
    """A text chunk whose name Pillow takes for an orientation or for what is clear."""
    return bytes(data[start : start + LONGEST_WORD]).startswith(TURNING_WORDS)


def _webp(data: memoryview) -> int:
    """A single chunk: one picture without metadata."""
    kind = bytes(data[12:16])
    if kind == b"VP8 ":
        return NO_ORIENTATION
    if kind == b"VP8L" and data[20] == 0x2F and not data[24] & 0x10:
        return NO_ORIENTATION
    return UNCLEAR


def _bmp(data: memoryview) -> int:
    offset, size, width, height, planes, bits, compression = struct.unpack_from(
        "<IIiiHHI", data, 10
    )
    row = (3 * width + 3) // 4 * 4
    is_plain = (offset, size, planes, bits, compression) == (54, 40, 1, 24, 0)
    has_all_rows = width > 0 and height > 0 and offset + row * height <= len(data)
    return NO_ORIENTATION if is_plain and has_all_rows else UNCLEAR


PLAIN: dict[str, Callable[[memoryview], int]] = {
    "JPEG": _jpeg,
    "MPO": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "BMP": _bmp,
}
