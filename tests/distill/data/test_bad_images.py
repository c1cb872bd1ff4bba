"""Every format comes out as Pillow sees it, upright in RGB; what is broken is told in one line, before the decoder."""

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from distill.data.bad_images import Header, examine, find_fault
from distill.data.crops import CropParameters, CropSpec, source_outputs
from distill.data.pipeline import build_pipeline
from distill.listing.decode import to_bitmap
from distill.listing.headers import Decoder
from tests.support.pictures import NEUTRAL, picture

PICTURE = Image.fromarray(picture(0, 48, 64))
GREY_16 = Image.fromarray(np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257)
TURNED = Image.Exif()
TURNED[0x0112] = 6


def encode(image: Image.Image, kind: str, **options: Any) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


FORMATS = {
    "jpeg": encode(PICTURE, "JPEG"),
    "progressive": encode(PICTURE, "JPEG", progressive=True),
    "grey": encode(PICTURE.convert("L"), "JPEG"),
    "cmyk": encode(PICTURE.convert("CMYK"), "JPEG"),
    "turned": encode(PICTURE, "JPEG", exif=TURNED),
    "png": encode(PICTURE, "PNG"),
    "palette": encode(PICTURE.convert("P"), "PNG"),
    "grey and alpha": encode(PICTURE.convert("LA"), "PNG"),
    "alpha": encode(PICTURE.convert("RGBA"), "PNG"),
    "16 bits": encode(GREY_16, "PNG"),
    "turned png": encode(PICTURE, "PNG", exif=TURNED),
    "webp": encode(PICTURE, "WEBP"),
    "turned webp": encode(PICTURE, "WEBP", exif=TURNED),
    "bmp": encode(PICTURE, "BMP"),
}


def as_pillow_sees_it(encoded: NDArray[np.uint8]) -> NDArray[np.int64]:
    with Image.open(io.BytesIO(encoded.data)) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # Pillow clips where it should scale
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return np.asarray(image.convert("RGB")).astype(np.int64)


@pytest.mark.parametrize("name", FORMATS)
def test_graph__reads_every_format_upright_in_rgb(name: str) -> None:
    encoded = FORMATS[name]
    expected = as_pillow_sees_it(encoded)
    height, width, _ = expected.shape
    header = examine(encoded, 64.0, is_full=False)
    assert isinstance(header, Header) and header.hw == (height, width)
    if header.decoder is Decoder.PILLOW:
        encoded = to_bitmap(encoded, None)
    side = min(height, width)
    spec = CropSpec(side, (1.0, 1.0), 0, 8, (1.0, 1.0), None, 0.0, (0.1, 2.0))
    window = [[[0.0, 0.0, side, side]] * 2]
    parameters = CropParameters(np.array(window, np.float32), np.array([[NEUTRAL] * 2], np.float32))
    batch = source_outputs([encoded], parameters, spec)
    output = build_pipeline(spec, lambda: batch, 1, 1, None, 1).run()[0].as_array()[0, 0]
    assert np.abs(output.transpose(1, 2, 0) - expected[:side, :side]).max() <= 1


def broken() -> dict[str, tuple[NDArray[np.uint8], str]]:
    noise = np.random.default_rng(0).integers(0, 255, 500, dtype=np.uint8)
    wide, huge = Image.new("L", (60_000, 1)), Image.new("1", (12_000, 9_000))
    return {
        "empty": (noise[:0], "empty file"),
        "noise": (noise, "not an image"),
        "text": (np.frombuffer(b"<html>not found</html>", np.uint8), "not an image"),
        "cut jpeg": (FORMATS["jpeg"][:-400], "truncated"),
        "cut header": (FORMATS["jpeg"][:30], "runcated"),
        "cut png": (FORMATS["png"][:-60], "truncated"),
        "cut webp": (FORMATS["webp"][:-20], "could not create decoder"),
        "gif": (encode(PICTURE, "GIF"), "GIF images are not read here"),
        "line": (encode(wide, "PNG"), "60000 x 1 px: a line, not an image"),
        "bomb": (encode(huge, "PNG"), "12000 x 9000 px, 108.0 megapixels: more than data.max_m"),
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", broken())
def test_examine__tells_what_is_wrong_in_one_line(name: str) -> None:
    encoded, told = broken()[name]
    reason = examine(encoded, 64.0, is_full=False)
    assert isinstance(reason, str) and told in reason and "\n" not in reason


def test_find_fault__an_image_that_changed_its_size() -> None:
    header = examine(FORMATS["turned"], 64.0, is_full=False)
    assert find_fault(header, (64, 48)) is None
    assert "is 48 x 64 px now" in str(find_fault(header, (48, 64)))


def test_redraw__is_upright_and_the_same() -> None:
    for name in ("turned webp", "png", "palette"):
        expected = as_pillow_sees_it(FORMATS[name])
        assert np.array_equal(as_pillow_sees_it(to_bitmap(FORMATS[name], None)), expected)
