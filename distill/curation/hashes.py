"""What an image is recognised by without a network: the hash of its bytes, 64 bits of its low frequencies, a thumbnail; both of its inside too.

bytes        SHA-256 of the encoded image
bits         grey, 32 x 32 px (Lanczos), two-dimensional DCT; of the lowest 8 x 8 frequencies those above their median
thumbnail    8 x 8 px in RGB; two images with the same bits are copies only where their thumbnails agree too
inside       bits and thumbnail of the middle INSIDE of height and width: those of a copy whose borders were cut off

The bits are those of ``imagehash.phash`` with hash size 8 and high-frequency factor 4 (Zauner 2010).
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64
from PIL import Image

from distill.data.locations import Location, Reader
from distill.listing.decode import decode_rgb, reason_of
from distill.listing.limit import in_order

HASH_SIDE, FREQUENCY_FACTOR = 8, 4
INSIDE = 0.9  # of height and width
BACKGROUND = (124, 116, 104)  # the default of data.mean, below clear pixels
LIMIT_S = 60.0  # for which reading one image may block
Window = tuple[float, float, float, float]  # left, top, right, bottom in px
Progress = Callable[[int, int], None]  # images done, of how many
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageHashes:
    """Hashes of images in their order, [1] those of their inside; where ``usable`` is false the others hold zeros."""

    sha256: UInt8[np.ndarray, "images 32"]
    bits: UInt64[np.ndarray, "2 images"]
    thumbnails: UInt8[np.ndarray, "2 images 192"]
    num_bytes: Int64[np.ndarray, " images"]
    usable: Bool[np.ndarray, " images"]


def perceptual_bits(grey: Image.Image, window: Window | None = None) -> int:
    """The 64 bits of a grey picture, or of a window of it, the first frequency as the highest bit."""
    from scipy.fft import dctn

    side = HASH_SIDE * FREQUENCY_FACTOR
    small = grey.resize((side, side), Image.Resampling.LANCZOS, box=window)
    low = dctn(np.asarray(small, np.float64))[:HASH_SIDE, :HASH_SIDE]
    bits = np.packbits(low > np.median(low))
    return int.from_bytes(bits.tobytes(), "big")


def _inside(picture: Image.Image) -> Window:
    across, down = ((1 - INSIDE) / 2 * side for side in picture.size)
    return across, down, picture.width - across, picture.height - down


def hash_images(locations: Sequence[Location], progress: Progress | None = None) -> ImageHashes:
    """Reads and decodes every image once; one that cannot be used is named in a warning.

    Raises:
        StorageError: its storage refuses an image for minutes, or answers for none.
    """
    count = len(locations)
    found = ImageHashes(
        np.zeros((count, 32), np.uint8),
        np.zeros((2, count), np.uint64),
        np.zeros((2, count, 3 * HASH_SIDE**2), np.uint8),
        np.zeros(count, np.int64),
        np.zeros(count, np.bool_),
    )
    reader = Reader(limit_s=LIMIT_S)

    def look(image: int) -> None:
        location = locations[image]
        try:
            encoded = reader.read(location)
            rgb = Image.fromarray(decode_rgb(encoded, BACKGROUND))
        except OSError as error:
            log.warning("%s: left out, cannot be used (%s)", location, reason_of(error))
            return
        digest = hashlib.sha256(encoded.data).digest()
        found.sha256[image] = np.frombuffer(digest, np.uint8)
        grey = rgb.convert("L")
        for part, window in enumerate((None, _inside(rgb))):
            found.bits[part, image] = perceptual_bits(grey, window)
            small = rgb.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX, box=window)
            found.thumbnails[part, image] = np.asarray(small).reshape(-1)
        found.num_bytes[image] = len(encoded)
        found.usable[image] = True

    threads = len(os.sched_getaffinity(0))
    for done, _ in enumerate(in_order(look, range(count), threads), start=1):
        if progress:
            progress(done, count)
    return found
