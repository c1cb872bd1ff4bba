"""An encoded image to pixels, by Pillow: the reference for training, scores, pictures and the contact sheet.

    upright     by EXIF, or by XMP where EXIF has no orientation, as Pillow's ``exif_transpose`` reads them
    16 bits     scaled to 8, where Pillow clips greys
    CMYK        as Pillow shows it
    clear       laid on one background, or as stored: the colours that lie hidden below it

In training DALI decodes the kinds for which ``distill.listing.headers`` knows that it gives the same; all others
are decoded here and handed to it as a bitmap.
"""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageFile

# about metadata, without the file's name; orientation is all that is read of it
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
Rgb = tuple[int, int, int]
ORIENTATION = 0x0112  # of EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPING = frozenset({5, 6, 7, 8})  # orientations that swap height and width
WITH_ALPHA = frozenset({"LA", "La", "RGBA", "RGBa", "PA"})  # modes of Pillow
OF_CLEAR_SAMPLE = {
    "L;2": 85,
    "L;4": 17,
}  # Pillow scales the samples of a PNG, but not its clear one


class UndecodableError(OSError):
    """An image that Pillow cannot decode; its text is the reason, in one line."""


@dataclass(frozen=True)
class Decoding:
    """How images are decoded: none of more megapixels, and clear ones on a background, None for "as stored"."""

    max_megapixels: float
    background: Rgb | None


@dataclass(frozen=True)
class Picture:
    """Upright pixels, and whether some of them were not opaque."""

    rgb: UInt8[np.ndarray, "height width 3"]
    is_transparent: bool


def background_of(
    value: Literal["mean", "stored"] | Rgb, mean: Sequence[float]
) -> tuple[int, int, int] | None:
    """The colour that ``data.background`` stands for; ``mean`` per channel is in [0, 1]. None: as stored."""
    if value == "mean":
        red, green, blue = (round(255 * channel) for channel in mean)
        return red, green, blue
    return None if isinstance(value, str) else value


def decode_rgb(
    encoded: NDArray[np.uint8], background: Rgb | None
) -> UInt8[np.ndarray, "height width 3"]:
    """The image upright in RGB; clear pixels are laid on ``background``, or kept as stored where it is None.

    Raises:
        UndecodableError: Pillow cannot decode it.
    """
    return decode_picture(encoded, background).rgb


def decode_picture(encoded: NDArray[np.uint8], background: Rgb | None) -> Picture:
    """As ``decode_rgb``, with what was found on the way.

    Raises:
        UndecodableError: Pillow cannot decode it.
    """
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "truncated images must be errors here"
    try:
        with Image.open(stream_of(encoded)) as image:
            raw = raw_mode(image)
            image.load()
            turn = TURNS.get(orientation_of(image))
            rgb, opacity = _rgb(image), _opacity(image, raw)
    except Exception as error:  # Pillow raises whatever its decoders raise
        raise UndecodableError(reason_of(error)) from error
    is_transparent = opacity is not None and opacity.getextrema() != (255, 255)
    if opacity is not None and is_transparent and background is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), opacity)
    if turn is not None:
        rgb = rgb.transpose(turn)
    return Picture(np.asarray(rgb), is_transparent)


def stream_of(encoded: NDArray[np.uint8]) -> io.BytesIO:
    """The bytes as a file; those that were read as ``bytes`` are not copied."""
    if isinstance(encoded.base, bytes) and len(encoded.base) == len(encoded):
        return io.BytesIO(encoded.base)
    return io.BytesIO(encoded.data)


def to_bitmap(encoded: NDArray[np.uint8], background: Rgb | None) -> NDArray[np.uint8]:
    """The image as ``decode_rgb`` gives it, as a bitmap that every decoder reads without a loss.

    Raises:
        UndecodableError: Pillow cannot decode it.
    """
    bitmap = io.BytesIO()
    Image.fromarray(decode_rgb(encoded, background)).save(bitmap, "BMP")
    return np.frombuffer(bitmap.getvalue(), np.uint8)


def orientation_of(image: Image.Image) -> int:
    """The orientation, 1 to 8, that Pillow turns an image by; 1 where its metadata cannot be read."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
        return next((known for known in TURNS if known == value), 1)
    except Exception:  # Pillow raises whatever its parsers raise; the pixels can be decoded
        return 1


def reason_of(error: Exception) -> str:
    """The reason why an image cannot be used, from an error, in one line."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "may not be read"
    if "cannot identify image file" in str(error):
        return "not an image"
    return (str(error).splitlines() or [""])[0].strip() or type(error).__name__


def raw_mode(image: Any) -> str:
    """How samples lie in the file, in Pillow's words; known before the pixels are read only."""
    arguments: Any = image.tile[0].args if image.tile else ""
    return arguments if isinstance(arguments, str) else ""


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if _has_table(image) or image.mode in WITH_ALPHA:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _has_table(image: Image.Image) -> bool:
    """A palette with opacities: one clear entry, or one opacity per entry."""
    return image.mode == "P" and isinstance(image.info.get("transparency"), bytes | int)


def _opacity(image: Image.Image, raw: str) -> Image.Image | None:
    """Opacity of each pixel, None where all are opaque by the kind of image."""
    if image.mode in WITH_ALPHA or _has_table(image):
        return image.convert("RGBA").getchannel("A")
    clear = image.info.get("transparency")  # a text of this name is metadata and means nothing
    if isinstance(clear, int) and (image.mode in ("1", "L") or image.mode.startswith("I")):
        samples = np.asarray(image.convert("L") if image.mode == "1" else image)
        is_clear = samples == clear * OF_CLEAR_SAMPLE.get(raw, 1)
    elif isinstance(clear, tuple) and image.mode == "RGB":
        shift = 8 if raw == "RGB;16B" else 0
        is_clear = (np.asarray(image) == [sample >> shift for sample in clear]).all(axis=2)
    else:
        return None
    return Image.fromarray(np.where(is_clear, 0, 255).astype(np.uint8))
