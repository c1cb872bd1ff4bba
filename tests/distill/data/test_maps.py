import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill.data.maps import decode_depth, decode_mask
from distill.listing.decode import UndecodableError


def png(image: Image.Image, **how: Any) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **how)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def npy(values: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    return np.frombuffer(buffer.getvalue(), np.uint8)


IDS = np.array([[0, 1, 3], [2, 15, 3]], np.uint8)


@pytest.mark.parametrize("bits", [4, 8])
def test_decode_mask__a_palette_is_its_index(bits: int) -> None:
    image = Image.fromarray(IDS)
    image.putpalette([value for index in range(16) for value in (index, 200, 255 - index)])
    assert decode_mask(png(image, bits=bits)).tolist() == IDS.tolist()


def test_decode_mask__grey_levels_of_8_and_16_bits_and_of_1() -> None:
    assert decode_mask(png(Image.fromarray(IDS))).tolist() == IDS.tolist()
    wide = IDS.astype(np.uint16) * 1000
    assert decode_mask(png(Image.fromarray(wide))).tolist() == wide.tolist()
    assert decode_mask(png(Image.fromarray(IDS > 1))).tolist() == (IDS > 1).astype(int).tolist()


def test_decode_mask__grey_of_4_bits_is_not_scaled_to_8() -> None:
    """Pillow multiplies its samples by 17, so that 15 would be 255, which is ignored."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0)
    data = zlib.compress(b"\x00\x1f")  # one row of the samples 1 and 15
    file = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    assert decode_mask(np.frombuffer(file, np.uint8)).tolist() == [[1, 15]]


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (png(Image.new("RGB", (2, 2))), r"colours \(RGB\); classes are grey levels or a palette"),
        (np.frombuffer(b"nothing", np.uint8), "not an image"),
        (png(Image.fromarray(IDS))[:40], "."),
    ],
)
def test_decode_mask__what_is_no_mask(encoded: np.ndarray, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason):
        decode_mask(encoded)


def test_decode_depth__npy_in_metres_and_png_in_levels() -> None:
    metres = np.array([[1.5, 0.0], [np.nan, -2.0]])
    assert decode_depth(npy(metres), 0.001).tolist() == [[1.5, 0.0], [0.0, 0.0]]
    assert decode_depth(npy(metres[..., None]), 0.001).tolist() == [[1.5, 0.0], [0.0, 0.0]]
    levels = Image.fromarray(np.array([[1500, 0], [10_000, 1]], np.uint16))
    found = decode_depth(png(levels), 0.001)
    assert found == pytest.approx(np.array([[1.5, 0.0], [10.0, 0.001]]))
    assert decode_depth(png(levels), 0.0002)[0, 0] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("encoded", "reason"),
    [
        (png(Image.fromarray(IDS)), "mode L; depth is 16-bit grey"),
        (npy(np.zeros((2, 3, 4))), r"shape \[2, 3, 4\]"),
        (npy(np.array([[{}]], object)), "."),
        (npy(np.zeros((4, 4)))[:90], "."),
        (npy(np.array([["a"]])), "."),
    ],
)
def test_decode_depth__what_is_no_depth(encoded: np.ndarray, reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason):
        decode_depth(encoded, 0.001)
