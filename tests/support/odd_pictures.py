"""Pictures of every kind that the decoders may differ on, encoded here byte by byte where no library writes them.

Each has a name ``FORMAT/KIND/DETAIL``. What is right for it is Pillow's picture; see ``distill.listing.decode``.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.support.pictures import picture

SIZES = ((1, 1), (1, 7), (7, 1), (2, 3), (5, 4), (16, 16), (17, 33), (48, 64), (7, 5000), (5000, 7))
EXIF_TYPES = {  # number, struct code; of one value
    "byte": (1, "B"),
    "short": (3, "H"),
    "long": (4, "I"),
    "sbyte": (6, "b"),
    "sshort": (8, "h"),
    "slong": (9, "i"),
}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # fmt: skip
Odd = tuple[str, bytes]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(height: int = 24, width: int = 40, seed: int = 0) -> Image.Image:
    """A picture without symmetry."""
    return Image.fromarray(picture(seed, height, width))


# EXIF and XMP


def exif_tiff(
    orientation: int,
    kind: str = "short",
    *,
    order: str = "<",
    count: int = 1,
    also: int | None = None,
    tag: int = 0x0112,
) -> bytes:
    """A TIFF block with one orientation tag, or with a second one behind it."""
    number, code = EXIF_TYPES[kind]
    entries = []
    for value in (orientation, *([] if also is None else [also])):
        field = struct.pack(order + code, value).ljust(4, b"\0")
        entries.append(struct.pack(order + "HHI", tag, number, count) + field)
    body = struct.pack(order + "H", len(entries)) + b"".join(entries) + bytes(4)
    mark = b"II" if order == "<" else b"MM"
    return mark + struct.pack(order + "HI", 42, 8) + body


def exif_rational(orientation: int, order: str = "<") -> bytes:
    """The orientation as a fraction behind the directory."""
    mark = b"II" if order == "<" else b"MM"
    entry = struct.pack(order + "HHII", 0x0112, 5, 1, 8 + 2 + 12 + 4)
    value = struct.pack(order + "II", 2 * orientation, 2)
    head = mark + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", 1)
    return head + entry + bytes(4) + value


def exif_elsewhere(orientation: int, where: str) -> bytes:
    """The orientation in the thumbnail's directory or in the camera's, where it is not the picture's."""
    small = struct.pack("<HHHI", 1, 0x0112, 3, 1) + struct.pack("<HH", orientation, 0) + bytes(4)
    if where == "thumbnail":
        first = struct.pack("<HHHI", 1, 0x0100, 3, 1) + struct.pack("<HH", 9, 0)
        return b"II" + struct.pack("<HI", 42, 8) + first + struct.pack("<I", 26) + small
    first = struct.pack("<HHHII", 1, 0x8769, 4, 1, 26) + bytes(4)
    return b"II" + struct.pack("<HI", 42, 8) + first + small


def exif_beside(orientation: int, tag: int, kind: int, count: int, value: int) -> bytes:
    """The orientation before another tag, whose value may lie behind the directory, at 38."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    entries += struct.pack("<HHII", tag, kind, count, value)
    head = b"II" + struct.pack("<HI", 42, 8) + struct.pack("<H", 2)
    return head + entries + bytes(4) + b"0123456789" + bytes(30)


def xmp(orientation: int, *, is_element: bool = False) -> bytes:
    """An XMP packet with an orientation."""
    head = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description'
    number = str(orientation).encode()
    if is_element:
        inner = b"><tiff:Orientation>" + number + b"</tiff:Orientation></rdf:Description>"
    else:
        inner = b' tiff:Orientation="' + number + b'"/>'
    return head + inner + b"</rdf:RDF></x:xmpmeta>"


def exif_blocks() -> Iterator[tuple[str, bytes]]:
    """TIFF blocks with an orientation written in every way that was met, and in some that may be."""
    for orientation in range(10):
        yield f"short-le-{orientation}", exif_tiff(orientation)
        yield f"short-be-{orientation}", exif_tiff(orientation, order=">")
    for kind, order in product(("byte", "long", "sbyte", "sshort", "slong"), "<>"):
        for orientation in (1, 3, 6):
            yield f"{kind}-{order}-{orientation}", exif_tiff(orientation, kind, order=order)
    for count in (0, 2, 3, 1000):
        yield f"count-{count}", exif_tiff(6, count=count)
    yield "twice-6-1", exif_tiff(6, also=1)
    yield "twice-1-6", exif_tiff(1, also=6)
    yield "rational-6", exif_rational(6)
    yield "rational-be-8", exif_rational(8, ">")
    yield "thumbnail", exif_elsewhere(6, "thumbnail")
    yield "camera", exif_elsewhere(6, "camera")
    yield "no-tag", exif_tiff(6, tag=0x0113)
    for name, entry in {
        "camera": (0x010F, 2, 10, 38),
        "camera-past-end": (0x010F, 2, 10, 4000),
        "camera-cut": (0x010F, 2, 100, 38),
        "camera-huge": (0x010F, 2, 2**31, 38),
        "camera-as-bytes": (0x010F, 7, 10, 38),
        "resolution": (0x011A, 5, 1, 38),
        "resolution-as-shorts": (0x011A, 3, 2, 65537),
        "white-point-cut": (0x013E, 5, 1, 70),
        "unknown-type": (0x0131, 99, 1, 38),
    }.items():
        yield f"beside-{name}", exif_beside(6, *entry)
    whole = exif_tiff(6)
    yield "cut", whole[:14]
    yield "cut-2", whole[:20]
    yield "empty", b""
    yield "magic-43", whole[:2] + b"\x2b\0" + whole[4:]
    yield "magic-0", whole[:2] + b"\0\0" + whole[4:]
    yield "offset-past-end", whole[:4] + struct.pack("<I", 4000) + whole[8:]
    yield "offset-12", whole[:4] + struct.pack("<I", 12) + bytes(4) + whole[8:]
    yield "offset-0", whole[:4] + struct.pack("<I", 0) + whole[8:]
    yield "count-too-large", whole[:8] + struct.pack("<H", 400) + whole[10:]
    yield "no-next", whole[:-4]
    yield "order-XX", b"XX" + whole[2:]


# JPEG


def segment(marker: int, data: bytes) -> bytes:
    """A JPEG marker segment."""
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def with_segments(jpeg: bytes, *segments: bytes, keeps_jfif: bool = True) -> bytes:
    """The file with segments behind its JFIF header, or in the place of it."""
    assert jpeg[2:4] == b"\xff\xe0"
    end = 4 + struct.unpack(">H", jpeg[4:6])[0]
    return jpeg[: end if keeps_jfif else 2] + b"".join(segments) + jpeg[end:]


def app1_exif(tiff: bytes) -> bytes:
    """The segment that a TIFF block lies in."""
    return segment(0xE1, b"Exif\0\0" + tiff)


def app1_xmp(packet: bytes) -> bytes:
    """The segment that an XMP packet lies in."""
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + packet)


def adobe(transform: int) -> bytes:
    """Adobe's segment about colours."""
    return segment(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform))


def without_marker(jpeg: bytes, marker: int) -> bytes:
    """The file without the segments of one kind."""
    position, kept = 2, [jpeg[:2]]
    while jpeg[position + 1] != 0xDA:
        end = position + 2 + struct.unpack(">H", jpeg[position + 2 : position + 4])[0]
        kept += [] if jpeg[position + 1] == marker else [jpeg[position:end]]
        position = end
    return b"".join([*kept, jpeg[position:]])


def edited(jpeg: bytes, offset_in_frame: int, *values: int) -> bytes:
    """The file with other bytes in its frame header (SOF): 4 precision, 9 components, 10 first id, 11 its sampling."""
    start = next(i for m in (b"\xff\xc0", b"\xff\xc2") if (i := jpeg.find(m)) > 0)
    at = start + offset_in_frame
    return jpeg[:at] + bytes(values) + jpeg[at + len(values) :]


def jpegs() -> Iterator[Odd]:
    """JPEG files."""
    base = saved(rgb(), "JPEG", quality=90)
    for name, tiff in exif_blocks():
        yield f"jpeg/exif/{name}", with_segments(base, app1_exif(tiff))
    for orientation in range(1, 9):
        yield f"jpeg/xmp/{orientation}", with_segments(base, app1_xmp(xmp(orientation)))
        element = app1_xmp(xmp(orientation, is_element=True))
        yield f"jpeg/xmp/element-{orientation}", with_segments(base, element)
    six, one = app1_exif(exif_tiff(6)), app1_exif(exif_tiff(1))
    packet = app1_xmp(xmp(6))
    for name, segments in {
        "6-1": (six, one),
        "1-6": (one, six),
        "6-6": (six, six),
        "exif-1-xmp-6": (one, packet),
        "xmp-6-exif-1": (packet, one),
        "exif-6-xmp-1": (six, app1_xmp(xmp(1))),
        "exif-0-xmp-6": (app1_exif(exif_tiff(0)), packet),
        "exif-none-xmp-6": (app1_exif(exif_tiff(6, tag=0x0113)), packet),
        "exif-cut-xmp-6": (app1_exif(exif_tiff(6)[:14]), packet),
        "xmp-6-xmp-3": (packet, app1_xmp(xmp(3))),
        "xmp-0": (app1_xmp(xmp(0)),),
        "xmp-9": (app1_xmp(xmp(9)),),
        "xmp-quoted": (app1_xmp(xmp(6).replace(b'"', b"'")),),
        "lower-case": (segment(0xE1, b"EXIF\0\0" + exif_tiff(6)),),
        "odd-pad": (segment(0xE1, b"Exif\0\xff" + exif_tiff(6)),),
        "app2": (segment(0xE2, b"Exif\0\0" + exif_tiff(6)),),
        "app0": (segment(0xE0, b"Exif\0\0" + exif_tiff(6)),),
        "comment": (segment(0xFE, b"a comment"),),
        "icc": (segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(200)),),
        "photoshop": (segment(0xED, b"Photoshop 3.0\0" + b"8BIM" + bytes(8)),),
        "jfxx": (segment(0xE0, b"JFXX\0\x13" + bytes(5)),),
        "adobe-0": (adobe(0),),
        "adobe-1": (adobe(1),),
        "adobe-2": (adobe(2),),
        "fill": (b"\xff\xff\xff" + six,),
    }.items():
        yield f"jpeg/markers/{name}", with_segments(base, *segments)
        if name != "fill":
            bare = with_segments(base, *segments, keeps_jfif=False)
            yield f"jpeg/markers/{name}-no-jfif", bare
    yield "jpeg/markers/none", with_segments(base, keeps_jfif=False)
    yield "jpeg/markers/trailing", base + bytes(300)
    yield "jpeg/markers/two-pictures", base + saved(rgb(8, 8, 2), "JPEG")
    late = base.find(b"\xff\xda")
    yield "jpeg/markers/exif-late", base[:late] + six + base[late:]
    yield "jpeg/markers/xmp-late", base[:late] + packet + base[late:]
    for ids in ((82, 71, 66), (0, 1, 2), (1, 2, 3), (1, 34, 35)):
        yield from _renamed(ids)
    for (height, width), sampling in product(SIZES, (0, 1, 2)):
        image = rgb(height, width, 1)
        name = f"{height}x{width}-{sampling}"
        yield f"jpeg/size/{name}", saved(image, "JPEG", subsampling=sampling, quality=85)
        if sampling != 1:
            tall = with_segments(saved(image, "JPEG", subsampling=sampling), six)
            yield f"jpeg/size/turned-{name}", tall
    for height, width in SIZES:
        grey = saved(rgb(height, width).convert("L"), "JPEG")
        yield f"jpeg/grey/{height}x{width}", grey
        yield f"jpeg/grey/2x2-{height}x{width}", edited(grey, 11, 0x22)
        slow = saved(rgb(height, width), "JPEG", progressive=True)
        yield f"jpeg/progressive/{height}x{width}", slow
    for quality, restart in product((1, 30, 75, 100), (0, 1)):
        options = {"quality": quality, "restart_marker_rows": restart, "optimize": bool(restart)}
        yield f"jpeg/quality/{quality}-{restart}", saved(rgb(40, 56, 4), "JPEG", **options)
    for sampling in ("4:4:4", "4:2:2", "4:2:0", "4:1:1"):
        large = saved(rgb(61, 83, 5), "JPEG", subsampling=sampling, quality=95)
        yield f"jpeg/sampling/{sampling}", large
        for orientation in (5, 6, 7, 8):
            turned = with_segments(large, app1_exif(exif_tiff(orientation)))
            yield f"jpeg/sampling/{sampling}-{orientation}", turned
    four = saved(rgb().convert("CMYK"), "JPEG")
    yield "jpeg/cmyk/adobe", four
    yield "jpeg/cmyk/no-adobe", without_marker(four, 0xEE)
    start = four.find(b"Adobe") + 11
    yield "jpeg/cmyk/ycck", four[:start] + b"\2" + four[start + 1 :]
    yield "jpeg/cmyk/adobe-1", four[:start] + b"\1" + four[start + 1 :]
    yield "jpeg/cmyk/turned", four[:2] + six + four[2:]
    frames = [rgb(32, 32, 6), rgb(32, 32, 7)]
    mpo = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    yield "jpeg/mpo/plain", mpo
    yield "jpeg/mpo/turned", saved(frames[0], "MPO", save_all=True, append_images=frames[1:], exif=b"Exif\0\0" + exif_tiff(6))  # fmt: skip


def _renamed(ids: tuple[int, int, int]) -> Iterator[Odd]:
    """Colour components under other names, in the frame header and in the scan's, with and without JFIF."""
    base = saved(rgb(), "JPEG", quality=90)
    scan = base.find(b"\xff\xda")
    data = bytearray(base)
    frame = base.find(b"\xff\xc0")
    for index, name in enumerate(ids):
        data[frame + 10 + 3 * index] = data[scan + 5 + 2 * index] = name
    label = "-".join(map(str, ids))
    yield f"jpeg/ids/{label}", bytes(data)
    yield f"jpeg/ids/{label}-no-jfif", with_segments(bytes(data), keeps_jfif=False)


# PNG


def chunk(name: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(
    samples: NDArray[Any],
    depth: int,
    colour: int,
    *,
    before: bytes = b"",
    after: bytes = b"",
    is_interlaced: bool = False,
    parts: int = 1,
) -> bytes:
    """A PNG of samples [height, width, channels], with chunks before and after those of its pixels."""
    height, width = samples.shape[:2]
    packed = samples.reshape(height, width, -1)
    passes = ADAM7 if is_interlaced else ((0, 0, 1, 1),)
    rows = b"".join(
        b"\0" + _packed(row, depth)
        for left, top, across, down in passes
        if packed[top::down, left::across].size
        for row in packed[top::down, left::across]
    )
    data = zlib.compress(rows)
    size = -(-len(data) // parts)
    pixels = b"".join(chunk(b"IDAT", data[i : i + size]) for i in range(0, len(data), size))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, is_interlaced)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + before + pixels + after + chunk(b"IEND", b"")


def _packed(row: NDArray[Any], depth: int) -> bytes:
    values = row.reshape(-1)
    if depth == 16:
        return values.astype(">u2").tobytes()
    if depth == 8:
        return values.astype(np.uint8).tobytes()
    bits = (values[:, None].astype(np.uint8) >> np.arange(depth)[::-1]) & 1
    return np.packbits(bits.reshape(-1)).tobytes()


def _samples(height: int, width: int, channels: int, depth: int) -> NDArray[np.int64]:
    """Smooth values that use all bits, and for alpha some that are wholly clear and wholly opaque."""
    colours = np.asarray(rgb(height, width, 3)).astype(np.int64)
    top = 2**depth - 1
    wanted = colours[..., :3] if channels >= 3 else colours[..., :1]
    scaled = (wanted * top + 127) // 255
    if depth == 16:
        scaled = np.minimum(scaled + np.arange(width)[None, :, None] % 200, top)
    if channels in (2, 4):
        alpha = (np.arange(height * width).reshape(height, width, 1) * 37) % 256
        alpha[: height // 3] = 0
        alpha[2 * height // 3 :] = 255
        scaled = np.concatenate([scaled, (alpha * top) // 255], axis=2)
    return scaled


CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # of a colour type; 3 has a palette
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 4: (8, 16), 6: (8, 16)}


def pngs() -> Iterator[Odd]:
    """PNG files."""
    for colour, depths in DEPTHS.items():
        for depth, is_interlaced in product(depths, (False, True)):
            for height, width in ((1, 1), (7, 5), (24, 40)):
                samples = _samples(height, width, CHANNELS[colour], depth)
                name = f"{colour}-{depth}-{height}x{width}" + "-interlaced" * is_interlaced
                yield f"png/mode/{name}", png(samples, depth, colour, is_interlaced=is_interlaced)
    yield from _palettes()
    plain = _samples(24, 40, 3, 8)
    for name, tiff in exif_blocks():
        yield f"png/exif/{name}", png(plain, 8, 2, before=chunk(b"eXIf", tiff))
    six, three = chunk(b"eXIf", exif_tiff(6)), chunk(b"eXIf", exif_tiff(3))
    raw = (b"\nexif\n%8d\n" % 44) + (b"Exif\0\0" + exif_tiff(6)).hex().encode() + b"\n"
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6))
    zipped = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(6)))
    profile = chunk(b"tEXt", b"Raw profile type exif\0" + raw)
    zprofile = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw))
    gamma = chunk(b"gAMA", struct.pack(">I", 100000))
    primaries = chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))  # fmt: skip
    for name, before, after in (
        ("exif-late", b"", six),
        ("exif-twice", six + three, b""),
        ("exif-early-late", three, six),
        ("exif-with-prefix", chunk(b"eXIf", b"Exif\0\0" + exif_tiff(6)), b""),
        ("xmp", text, b""),
        ("xmp-late", b"", text),
        ("xmp-zipped", zipped, b""),
        ("xmp-1", chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(1)), b""),
        ("exif-1-xmp-6", chunk(b"eXIf", exif_tiff(1)) + text, b""),
        ("profile", profile, b""),
        ("profile-late", b"", profile),
        ("profile-zipped", zprofile, b""),
        ("comment", chunk(b"tEXt", b"Comment\0hello"), chunk(b"tEXt", b"Comment\0late")),
        ("gamma", gamma, b""),
        ("gamma-2", chunk(b"gAMA", struct.pack(">I", 45455)) + primaries, b""),
        ("srgb", chunk(b"sRGB", b"\0") + chunk(b"pHYs", struct.pack(">IIB", 2835, 2835, 1)), b""),
        ("icc", chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(200))), b""),
        ("cicp", chunk(b"cICP", bytes((9, 16, 0, 1))), b""),
        ("sbit", chunk(b"sBIT", bytes((5, 6, 5))), b""),
        ("background", chunk(b"bKGD", struct.pack(">HHH", 255, 0, 0)), b""),
        ("private", chunk(b"vpAg", bytes(9)), chunk(b"prVt", b"x")),
        ("time", chunk(b"tIME", bytes((7, 208, 1, 1, 0, 0, 0))), b""),
    ):
        yield f"png/chunks/{name}", png(plain, 8, 2, before=before, after=after)
    for word in ("exif", "xmp", "transparency", "icc_profile", "duration"):
        yield (
            f"png/chunks/text-{word}",
            png(plain, 8, 2, before=chunk(b"tEXt", word.encode() + b"\0001")),
        )
    yield "png/chunks/many-parts", png(plain, 8, 2, parts=9)
    yield "png/chunks/trailing", png(plain, 8, 2) + bytes(100)
    alpha = _samples(24, 40, 4, 8)
    yield "png/chunks/alpha-exif", png(alpha, 8, 6, before=six)
    yield "png/chunks/alpha-gamma", png(alpha, 8, 6, before=gamma)
    sixteen = _samples(24, 40, 1, 16)
    yield "png/depth/grey-12-in-16", png(sixteen >> 4, 16, 0)
    yield "png/depth/grey-16-turned", png(sixteen, 16, 0, before=six)
    yield "png/depth/grey-16-clear", png(sixteen, 16, 0, before=chunk(b"tRNS", struct.pack(">H", sixteen[3, 3, 0])))  # fmt: skip
    for height, width in SIZES:
        for colour in (0, 2, 6):
            wanted = _samples(height, width, CHANNELS[colour], 8)
            yield f"png/size/{colour}-{height}x{width}", png(wanted, 8, colour)
    red = struct.pack(">HHH", *plain[2, 2].tolist())
    yield "png/clear/rgb", png(plain, 8, 2, before=chunk(b"tRNS", red))
    wide = _samples(24, 40, 3, 16)
    key = struct.pack(">HHH", *wide[2, 2].tolist())
    yield "png/clear/rgb-16", png(wide, 16, 2, before=chunk(b"tRNS", key))
    for depth in (1, 2, 4, 8):
        grey = _samples(24, 40, 1, depth)
        value = struct.pack(">H", int(grey[2, 2, 0]))
        yield f"png/clear/grey-{depth}", png(grey, depth, 0, before=chunk(b"tRNS", value))
    frames = [rgb(24, 24, 8), rgb(24, 24, 9)]
    yield "png/apng/same", saved(frames[0], "PNG", save_all=True, append_images=frames[1:])
    yield "png/apng/separate", saved(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)  # fmt: skip


def _palettes() -> Iterator[Odd]:
    short = chunk(b"PLTE", bytes(range(30, 45)))
    yield "png/palette/short", png(np.arange(16).reshape(4, 4, 1), 4, 3, before=short)
    for depth, is_interlaced in product((1, 2, 4, 8), (False, True)):
        colours = 2**depth
        palette = (np.arange(colours * 3) * 53 % 256).astype(np.uint8).tobytes()
        indices = (np.arange(11 * 13).reshape(11, 13, 1) * 7) % colours
        options: Any = {"is_interlaced": is_interlaced}
        table = chunk(b"PLTE", palette)
        name = f"{depth}" + "-interlaced" * is_interlaced
        yield f"png/palette/{name}", png(indices, depth, 3, before=table, **options)
        one = chunk(b"tRNS", b"\0")
        yield f"png/palette/{name}-clear-one", png(indices, depth, 3, before=table + one, **options)
        some = chunk(b"tRNS", bytes(range(0, 256, 64))[:colours])
        yield f"png/palette/{name}-clear-some", png(indices, depth, 3, before=table + some, **options)  # fmt: skip


# WebP and BMP


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP container."""
    body = b"".join(n + struct.pack("<I", len(d)) + d + b"\0" * (len(d) % 2) for n, d in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webps() -> Iterator[Odd]:
    """WebP files."""
    for (height, width), is_lossless in product(SIZES, (False, True)):
        name = f"{height}x{width}" + "-lossless" * is_lossless
        yield f"webp/size/{name}", saved(rgb(height, width, 2), "WEBP", lossless=is_lossless)
    clear = Image.fromarray(_samples(24, 40, 4, 8).astype(np.uint8))
    opaque = rgb().convert("RGBA")
    for is_lossless in (False, True):
        kind = "lossless" if is_lossless else "lossy"
        options: Any = {"lossless": is_lossless}
        yield f"webp/alpha/{kind}", saved(clear, "WEBP", exact=True, **options)
        yield f"webp/alpha/{kind}-opaque", saved(opaque, "WEBP", **options)
        yield f"webp/chunks/{kind}-icc", saved(rgb(), "WEBP", icc_profile=bytes(200), **options)
        yield f"webp/chunks/{kind}-xmp", saved(rgb(), "WEBP", xmp=xmp(6), **options)
        yield f"webp/chunks/{kind}-xmp-1", saved(rgb(), "WEBP", xmp=xmp(1), **options)
        for orientation in range(1, 9):
            tiff = b"Exif\0\0" * (orientation % 2) + exif_tiff(orientation)
            name = f"webp/exif/{kind}-{orientation}"
            yield name, saved(rgb(), "WEBP", exif=tiff, **options)
        movie = [rgb(16, 16, 1), rgb(16, 16, 2)]
        yield f"webp/movie/{kind}", saved(movie[0], "WEBP", save_all=True, append_images=movie[1:], **options)  # fmt: skip
    simple = saved(rgb(), "WEBP")
    size, data = struct.unpack("<I", simple[16:20])[0], simple[20:]
    wide = struct.pack("<I", 39)[:3] + struct.pack("<I", 23)[:3]
    for name, flags, more in (
        ("bare", 0, ()),
        ("exif-flag-only", 8, ()),
        ("exif-no-flag", 0, ((b"EXIF", exif_tiff(6)),)),
        ("unknown", 0, ((b"abcd", b"12345"),)),
    ):
        head = (b"VP8X", bytes((flags, 0, 0, 0)) + wide)
        yield f"webp/extended/{name}", riff(head, (b"VP8 ", data[:size]), *more)


def bmp(
    pixels: bytes, height: int, width: int, bits: int, *, extra: bytes = b"", compression: int = 0,
    size: int = 40, colours: int = 0, tail: bytes = b"",
) -> bytes:  # fmt: skip
    """A BMP; ``extra`` are masks or a palette behind its header, ``tail`` what a longer header holds."""
    header = struct.pack("<IiiHHIIiiII", size, width, height, 1, bits, compression, len(pixels), 0, 0, colours, 0)  # fmt: skip
    header = (header + tail).ljust(size, b"\0")
    offset = 14 + len(header) + len(extra)
    start = b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset)
    return start + header + extra + pixels


def _rows(samples: NDArray[np.uint8], *, is_flipped: bool = True) -> bytes:
    """Rows of bytes, from the last to the first, each of a multiple of four bytes."""
    rows = samples.reshape(len(samples), -1)
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))
    return (padded[::-1] if is_flipped else padded).tobytes()


def bmps() -> Iterator[Odd]:
    """BMP and DIB files."""
    for height, width in SIZES:
        image = rgb(height, width, 6)
        colours = np.asarray(image)[..., ::-1]
        name = f"{height}x{width}"
        yield f"bmp/24/{name}", saved(image, "BMP")
        yield f"bmp/grey/{name}", saved(image.convert("L"), "BMP")
        yield f"bmp/palette/{name}", saved(image.quantize(16), "BMP")
        top = _rows(colours, is_flipped=False)
        yield f"bmp/top-down/{name}", bmp(top, -height, width, 24)
        four = np.concatenate([colours, colours[..., :1]], axis=2)
        yield f"bmp/32/{name}", bmp(_rows(four), height, width, 32)
    image = rgb(13, 22, 7)
    colours = np.asarray(image)[..., ::-1]
    wide = colours.astype(np.uint16)
    for name, shifts, masks in (
        ("565", (3, 2, 3, 0, 5, 11), (0xF800, 0x7E0, 0x1F)),
        ("555", (3, 3, 3, 0, 5, 10), (0x7C00, 0x3E0, 0x1F)),
    ):
        parts = [(wide[..., i] >> shifts[i]) << shifts[3 + i] for i in range(3)]
        packed = (parts[0] | parts[1] | parts[2]).astype("<u2").view(np.uint8).reshape(13, -1)
        extra = struct.pack("<III", *masks)
        yield f"bmp/16/{name}", bmp(_rows(packed), 13, 22, 16, extra=extra, compression=3)
        if name == "555":
            yield "bmp/16/555-plain", bmp(_rows(packed), 13, 22, 16)
    alpha = np.concatenate([colours, np.asarray(image)[..., :1]], axis=2)
    masks32 = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    for size in (56, 108, 124):
        whole = bmp(_rows(alpha), 13, 22, 32, size=size, compression=3, tail=masks32)
        yield f"bmp/alpha/v{size}", whole
        yield f"bmp/header/v{size}", bmp(_rows(colours), 13, 22, 24, size=size)
    no_alpha = struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)
    yield "bmp/32/masks", bmp(_rows(alpha), 13, 22, 32, extra=no_alpha, compression=3)
    yield "bmp/mono/1", saved(image.convert("1"), "BMP")
    runs = b"".join(bytes((22, 10 * row)) + b"\0\0" for row in range(13)) + b"\0\1"
    table = b"".join(bytes((i, i // 2, 255 - i, 0)) for i in range(256))
    yield "bmp/rle/8", bmp(runs, 13, 22, 8, extra=table, compression=1, colours=256)
    core = b"BM" + struct.pack("<IHHI", 26 + len(_rows(colours)), 0, 0, 26)
    core += struct.pack("<IHHHH", 12, 22, 13, 1, 24)
    yield "bmp/os2/24", core + _rows(colours)
    yield "bmp/24/gap", _with_gap(saved(image, "BMP"))
    yield "bmp/24/trailing", saved(image, "BMP") + bytes(50)
    yield "bmp/dib/24", saved(image, "DIB")


def _with_gap(data: bytes) -> bytes:
    """Pixels some bytes behind the header."""
    offset = struct.unpack("<I", data[10:14])[0]
    return data[:10] + struct.pack("<I", offset + 8) + data[14:offset] + bytes(8) + data[offset:]


def odd_pictures() -> dict[str, bytes]:
    """All of them, by name."""
    made = [*jpegs(), *pngs(), *webps(), *bmps()]
    assert len({name for name, _ in made}) == len(made), "a name stands for one picture"
    return dict(made)
