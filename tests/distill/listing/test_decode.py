"""Every kind of picture is drawn in training as Pillow shows it: who decodes it is decided from its header, and the rule has no miss."""

import io
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from nvidia.dali import fn
from nvidia.dali.pipeline import pipeline_def
from PIL import Image, ImageOps

from distill.data.bad_images import Header, examine
from distill.data.pipeline import _decode
from distill.listing.decode import (
    UndecodableError,
    background_of,
    decode_picture,
    decode_rgb,
    to_bitmap,
)
from distill.listing.headers import Decoder
from tests.support.odd_pictures import app1_exif, chunk, exif_tiff, odd_pictures, png, rgb, saved

BACKGROUND = (124, 116, 104)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about odd EXIF
WITH_ALPHA = {"LA", "RGBA", "PA"}
# kinds for which Pillow's own picture is not the right one, and what is right
UNREADABLE = frozenset(  # Pillow raises over the metadata: upright
    {
        "png/exif/magic-43",
        "png/exif/magic-0",
        "png/exif/order-XX",
        "png/chunks/text-exif",
        "png/chunks/text-xmp",
    }
)
UNSCALED = (
    frozenset(  # Pillow looks for the clear sample of a file among samples that it has scaled
        {"png/clear/grey-2", "png/clear/grey-4", "png/clear/rgb-16", "png/depth/grey-16-clear"}
    )
)


@cache
def corpus() -> dict[str, NDArray[np.uint8]]:
    return {name: np.frombuffer(data, np.uint8) for name, data in odd_pictures().items()}


def as_pillow_shows_it(name: str, encoded: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Pillow's ``exif_transpose``, 16 bits scaled, what is clear on the background; written without the code under test."""
    with Image.open(io.BytesIO(encoded.data)) as file:
        if name in UNREADABLE:
            file.load()
            image: Any = file.copy()
        else:
            image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):
        image = Image.fromarray(np.round(np.asarray(image) * (255 / 65535)).astype(np.uint8))
    is_clear = isinstance(image.info.get("transparency"), bytes | int | tuple)
    if name in UNSCALED or not (image.mode in WITH_ALPHA or is_clear):
        return np.asarray(image.convert("RGB")).astype(np.int64)
    parts = np.asarray(image.convert("RGBA")).astype(np.float64)
    opacity = parts[..., 3:] / 255
    return np.round(parts[..., :3] * opacity + np.array(BACKGROUND) * (1 - opacity)).astype(
        np.int64
    )


def as_training_draws_them(encoded: list[NDArray[np.uint8]]) -> list[NDArray[np.int64]]:
    """What the loader's graph decodes, all in one batch."""

    @pipeline_def(batch_size=len(encoded), num_threads=2, device_id=None, prefetch_queue_depth=1)
    def graph() -> Any:
        return _decode(fn.external_source(source=lambda: encoded, batch=True), None)

    pipeline = graph()
    pipeline.build()
    (output,) = pipeline.run()
    return [np.asarray(output[i]).astype(np.int64) for i in range(len(encoded))]


def header_of(encoded: NDArray[np.uint8]) -> Header:
    found = examine(encoded, 64.0, is_full=True)
    assert isinstance(found, Header), found
    assert examine(encoded, 64.0, is_full=False) == found, "the header alone says the same"
    return found


def differences(names: list[str]) -> tuple[dict[str, str], Counter[str]]:
    """Pictures that training draws otherwise than Pillow, and how many each decoder drew."""
    headers = {name: header_of(corpus()[name]) for name in names}
    given = [
        corpus()[name]
        if headers[name].decoder is Decoder.DALI
        else to_bitmap(corpus()[name], BACKGROUND)
        for name in names
    ]
    wrong = {}
    for name, drawn in zip(names, as_training_draws_them(given), strict=True):
        expected = as_pillow_shows_it(name, corpus()[name])
        scored = decode_rgb(corpus()[name], BACKGROUND).astype(np.int64)
        if not drawn.shape == scored.shape == expected.shape:
            wrong[name] = f"{drawn.shape}, scored {scored.shape}, not {expected.shape}"
        elif headers[name].hw != drawn.shape[:2]:
            wrong[name] = f"{drawn.shape}, indexed as {headers[name].hw}"
        elif name in UNSCALED:
            wrong |= {} if np.array_equal(drawn, scored) else {name: "scored otherwise"}
        elif np.abs(drawn - expected).max() > 1 or np.abs(scored - expected).max() > 1:
            wrong[name] = f"{np.abs(drawn - expected).max()} levels"
    return wrong, Counter(headers[name].decoder.name for name in names)


def test_corpus__every_picture_is_drawn_as_pillow_shows_it() -> None:
    wrong, drawn = differences(list(corpus()))
    assert wrong == {}
    assert len(corpus()) >= 400 and min(drawn.values()) >= 150
    assert len({name.rsplit("/", 1)[0] for name in corpus()}) >= 30  # kinds
    assert sum(map(bool, (UNREADABLE, UNSCALED))) <= 5  # kinds of exceptions


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "turned", "png", "webp", "bmp"])
def test_look__plain_pictures_go_to_the_fast_decoder(kind: str) -> None:
    image, exif = rgb(), Image.Exif()
    exif[0x0112] = 6
    encoded = {
        "jpeg": lambda: saved(image, "JPEG"),
        "progressive": lambda: saved(image, "JPEG", progressive=True),
        "turned": lambda: saved(image, "JPEG", exif=exif),
        "png": lambda: saved(image, "PNG"),
        "webp": lambda: saved(image, "WEBP"),
        "bmp": lambda: saved(image, "BMP"),
    }[kind]()
    assert header_of(np.frombuffer(encoded, np.uint8)).decoder is Decoder.DALI


def clear_key_cases() -> dict[str, tuple[bytes, NDArray[np.uint8]]]:
    """PNG files in which one sample is clear, and their pictures on the background."""
    cases = {}
    for depth, scale in ((1, 255), (2, 85), (4, 17), (8, 1)):
        grey = np.arange(48).reshape(6, 8, 1) % 2**depth
        wanted = np.repeat(grey * scale, 3, axis=2)
        wanted[grey[..., 0] == 1] = BACKGROUND
        cases[f"grey {depth}"] = png(grey, depth, 0, before=chunk(b"tRNS", b"\0\1")), wanted
    deep = np.arange(48).reshape(6, 8, 1) * 1000 + 7
    wanted = np.repeat(np.round(deep / 257).astype(np.int64), 3, axis=2)
    wanted[deep[..., 0] == 5007] = BACKGROUND
    key = chunk(b"tRNS", (5007).to_bytes(2, "big"))
    cases["grey 16"] = png(deep, 16, 0, before=key), wanted
    colours = np.concatenate([deep, deep, 65535 - deep], axis=2)
    wanted = colours >> 8
    wanted[deep[..., 0] == 5007] = BACKGROUND
    value = b"".join(int(sample).to_bytes(2, "big") for sample in colours[0, 5])
    cases["rgb 16"] = png(colours, 16, 2, before=chunk(b"tRNS", value)), wanted
    return {name: (data, array.astype(np.uint8)) for name, (data, array) in cases.items()}


@pytest.mark.parametrize("name", clear_key_cases())
def test_decode_picture__a_clear_sample_of_any_depth(name: str) -> None:
    data, wanted = clear_key_cases()[name]
    picture = decode_picture(np.frombuffer(data, np.uint8), BACKGROUND)
    assert picture.is_transparent and np.array_equal(picture.rgb, wanted)


def test_decode_picture__a_hidden_colour_shows_only_as_stored() -> None:
    samples = np.zeros((8, 8, 4), np.uint8)
    samples[2:4, 2:4, 3] = 255  # a black shape on clear black
    encoded = np.frombuffer(png(samples, 8, 6), np.uint8)
    assert decode_rgb(encoded, None).max() == 0
    laid = decode_rgb(encoded, (10, 200, 30))
    assert laid[0, 0].tolist() == [10, 200, 30] and laid[3, 3].tolist() == [0, 0, 0]
    assert as_training_draws_them([to_bitmap(encoded, (10, 200, 30))])[0].tolist() == laid.tolist()


def test_decode_picture__an_opaque_alpha_changes_nothing() -> None:
    opaque = np.frombuffer(saved(rgb().convert("RGBA"), "PNG"), np.uint8)
    picture = decode_picture(opaque, BACKGROUND)
    assert not picture.is_transparent and np.array_equal(picture.rgb, np.asarray(rgb()))


def test_decode_picture__what_cannot_be_decoded_is_one_kind_of_error() -> None:
    whole = saved(rgb(), "JPEG")
    damaged = whole[: len(whole) // 2] + b"\xff\xd9"
    for data in (b"", b"no image", damaged, app1_exif(exif_tiff(6))):
        with pytest.raises(UndecodableError):
            decode_picture(np.frombuffer(data, np.uint8), None)


def test_background_of__mean_colour_or_stored() -> None:
    assert background_of("mean", (0.485, 0.456, 0.406)) == BACKGROUND
    assert background_of("stored", (0.5, 0.5, 0.5)) is None
    assert background_of((1, 2, 3), (0.5, 0.5, 0.5)) == (1, 2, 3)
