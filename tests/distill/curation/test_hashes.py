"""Hashes of images: the bits of imagehash 4.3.2, recorded from ``imagehash.phash(picture, 8, 4)`` in RGB."""

import hashlib
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.curation.hashes import hash_images, perceptual_bits
from distill.data.photographs import photograph_paths
from distill.listing.locations import Location

RECORDED = {
    "astronaut": 0xC2924C5532BDDFC8,
    "brick": 0xA2898B1566FD46F1,
    "camera": 0xBFF1C1C0434E8CBC,
    "cell": 0xB46A4BB4B44B4BB4,
    "chelsea": 0xB15FE6465121175E,
    "clock": 0xD993669C993364CC,
    "coffee": 0xBB8320376C0F3637,
    "coins": 0xE4D5B5A92B54523A,
    "grass": 0x92F2E18BA30B770D,
    "gravel": 0xC6771CBE3D2424A6,
    "horse": 0xAD7AD2863235B534,
    "ihc": 0xAF3225E7C9691686,
    "moon": 0xA3D9765014369C77,
    "motorcycle": 0xC507C66B9370AA73,
    "page": 0x81EFA4A966D892DA,
    "text": 0xB620BA8E2371CDDC,
}


@pytest.mark.parametrize("name", RECORDED)
def test_perceptual_bits__are_those_of_imagehash(name: str) -> None:
    with Image.open(photograph_paths()[name]) as opened:
        assert perceptual_bits(opened.convert("RGB").convert("L")) == RECORDED[name]


def test_hash_images__reads_bytes_bits_and_thumbnails_and_names_what_is_broken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = (200, 100, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    counted: list[tuple[int, int]] = []
    with caplog.at_level(logging.WARNING):
        found = hash_images(
            [Location.of(tmp_path / name) for name in ("a.png", "b.png")],
            lambda done, total: counted.append((done, total)),
        )
    data = (tmp_path / "a.png").read_bytes()
    assert found.sha256[0].tobytes() == hashlib.sha256(data).digest()
    assert found.num_bytes.tolist() == [len(data), 0]
    assert found.usable.tolist() == [True, False] and (found.bits[:, 1] == 0).all()
    thumbnail = found.thumbnails[0, 0].reshape(8, 8, 3)
    assert (thumbnail[:, :4] == 0).all() and (thumbnail[:, 4:] == (200, 100, 0)).all()
    assert counted == [(1, 2), (2, 2)]
    assert "b.png: left out, cannot be used" in caplog.text


def test_hash_images__the_inside_is_what_a_cropped_copy_shows(tmp_path: Path) -> None:
    with Image.open(photograph_paths()["coffee"]) as opened:
        picture = opened.convert("RGB").crop((0, 0, 400, 300))
    picture.save(tmp_path / "a.png")
    picture.crop((20, 15, 380, 285)).save(tmp_path / "b.png")
    found = hash_images([Location.of(tmp_path / name) for name in ("a.png", "b.png")])
    assert found.bits[1, 0] == found.bits[0, 1] != found.bits[0, 0]
    assert (found.thumbnails[1, 0] == found.thumbnails[0, 1]).all()
