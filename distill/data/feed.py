"""What the decoder is given for a step: encoded images and the parameters of their crops, prepared ahead by threads.

    positions of this rank -> sample ids -> bytes -> (a bad one: its substitute) -> windows and colours

What DALI would decode otherwise than Pillow, by its header, is decoded here and goes to it as a bitmap.

A bad sample's place is taken by another of its source, chosen by a hash of the place: any rank, any
layout and any restart chooses the same.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.data.bad_images import examine, find_fault
from distill.data.bad_samples import BadSamples
from distill.data.crops import CropParameters, CropSchedule, draw_parameters
from distill.data.index import ImageIndex
from distill.data.locations import Reader
from distill.data.sampler import Ints, Pool, Sampler
from distill.data.stateless_random import hashes
from distill.errors import DataError
from distill.listing.decode import Decoding, UndecodableError, to_bitmap
from distill.listing.headers import Decoder

PREPARED = 2  # steps read ahead of the decoder
READ_THREADS = 8  # they wait for disks and networks
MAX_SUBSTITUTES = 100  # tries; so many bad ones in a row are no accident

Encoded = NDArray[np.uint8]
Shape = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Prepared:
    """One step of one rank: ids of the images that are really used, their sizes [images, 2], their bytes, how they are cropped, and their sources' colours."""

    step: int
    positions: range
    ids: Ints
    hw: NDArray[np.int32]
    encoded: list[Encoded]
    parameters: CropParameters
    pixel_stats: NDArray[np.float32] | None


class Feed:
    """Prepares the steps of one rank in order, from any step on.

    Args:
        index: the images.
        crops: what is cut from them.
        sampler: which image stands where; windows, colours and substitutes come of its seed too.
        bad: gets images that cannot be used.
        positions: the positions wanted at a step.
        stop_step: no step from this one on is wanted.
        decoding: larger images are not decoded, and clear ones are laid on its background.
    """

    def __init__(
        self,
        index: ImageIndex,
        crops: CropSchedule,
        sampler: Sampler,
        bad: BadSamples,
        *,
        positions: Callable[[int], range],
        stop_step: int,
        decoding: Decoding,
    ) -> None:
        self._index, self._crops, self._sampler, self._bad = index, crops, sampler, bad
        self._seed, self.positions, self._stop_step = sampler.seed, positions, stop_step
        self._decoding = decoding
        self._reader = Reader()
        self._known: dict[int, str] = {}  # bad images and why
        self._as_bitmap: set[int] = set()  # good ones that DALI refused, whatever their header is
        self._preparing = ThreadPoolExecutor(1, "feed")
        self._reading = ThreadPoolExecutor(READ_THREADS, "read")
        self._ahead: deque[Future[Prepared]] = deque()
        self._next_step = 0

    def read_by(self, reader: Reader) -> None:
        """Reads by another reader from now on: one whose storage reports what it waits for."""
        self._reader = reader

    @property
    def has_pixel_stats(self) -> bool:
        """Sources have separate means and standard deviations."""
        return self._sampler.has_pixel_stats

    def start(self, step: int) -> None:
        """Forgets what is prepared and goes on from a step."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._next_step = step
        self._extend()

    def take(self) -> Prepared | None:
        """The next step that has images here; None after the last.

        Raises:
            DataError: too many images are bad, or a source is gone.
            StorageError: the storage has refused an image for minutes.
        """
        if not self._ahead:
            return None
        prepared = self._ahead.popleft().result()
        self._extend()
        return prepared

    def refuse(self, image: int, encoded: Encoded) -> None:
        """Notes that the decoder cannot decode an image: from the next ``start`` on Pillow does, or a substitute is used."""
        header = examine(encoded, self._decoding.max_megapixels, is_full=True)
        if isinstance(header, str) or image in self._as_bitmap:
            self._known[image] = header if isinstance(header, str) else "the decoder refuses it"
        else:
            self._as_bitmap.add(image)

    def close(self) -> None:
        """Ends the threads."""
        self.start(self._stop_step)
        self._preparing.shutdown(cancel_futures=True)
        self._reading.shutdown(cancel_futures=True)

    def _extend(self) -> None:
        while len(self._ahead) < PREPARED and self._next_step < self._stop_step:
            step = self._next_step
            self._next_step += 1
            if len(self.positions(step)):  # a step without images has no batch
                self._ahead.append(self._preparing.submit(self._prepare, step))

    def _prepare(self, step: int) -> Prepared:
        wanted = self.positions(step)
        positions = np.arange(wanted.start, wanted.stop)
        drawn, pools = self._sampler.draw(step, positions)
        self._bad.add_draws(len(drawn))
        tasks = [
            self._reading.submit(self._read, step, int(position), int(image), pool)
            for position, image, pool in zip(positions, drawn, pools, strict=True)
        ]
        results = [task.result() for task in tasks]
        for *_, refused in results:
            for image, reason in refused:
                self._known[image] = reason
                self._bad.add(str(self._index.location(image)), reason)
        ids = np.array([image for image, *_ in results], np.int64)
        hw = np.array([shape for _, shape, *_ in results], np.int32)
        parameters = draw_parameters(
            self._crops.at(step),
            seed=self._seed,
            step=step,
            positions=positions,
            sample_ids=ids,
            hw=hw,
        )
        images = [encoded for _, _, encoded, _ in results]
        return Prepared(step, wanted, ids, hw, images, parameters, self._pixel_stats(pools))

    def _pixel_stats(self, pools: Sequence[Pool]) -> NDArray[np.float32] | None:
        """Mean and standard deviation of each image's source, where sources have separate ones."""
        stats = [pool.pixel_stats for pool in pools if pool.pixel_stats is not None]
        assert len(stats) in (0, len(pools)), "all pools have colours or none has"
        return np.array(stats, np.float32) if stats else None

    def _read(
        self, step: int, position: int, image: int, pool: Pool
    ) -> tuple[int, Shape, Encoded, list[tuple[int, str]]]:
        """The image that is used at a position, its size and bytes, and those that were refused before it."""
        refused: list[tuple[int, str]] = []
        for attempt in range(MAX_SUBSTITUTES):
            fault = self._known.get(image)
            if fault is None:
                tried = self._try(image)
                if not isinstance(tried, str):
                    return image, *tried, refused
                fault = tried
            refused.append((image, fault))
            word = hashes("substitute", self._seed, step, position, attempt)
            image = pool.start + int(word % np.uint64(pool.stop - pool.start))
        raise DataError(
            f"{self._index.location(refused[0][0])}: cannot be used ({refused[0][1]}), and neither can {MAX_SUBSTITUTES - 1} others",
            fix="Look at the source: distill data check names every file.",
        )

    def _try(self, image: int) -> tuple[Shape, Encoded] | str:
        """Size and bytes of an image as the decoder gets them, or why it cannot be used."""
        location = self._index.location(image)
        try:
            encoded = self._reader.read(location)
        except OSError as error:
            if self._reader.is_gone(location):
                raise DataError(
                    f"{location.container}: the source is gone ({error.strerror or error})",
                    fix="Bring it back; the same command goes on from the last checkpoint.",
                ) from error
            return "no such file" if isinstance(error, FileNotFoundError) else str(error)
        header = examine(encoded, self._decoding.max_megapixels, is_full=False)
        height, width = self._index.hw[image].tolist()
        decoder = self._index.decoder(image)
        if isinstance(header, str):
            return header
        if decoder is Decoder.UNDECIDED:
            decoder = header.decoder
            if header.hw == (width, height):  # version 0.1.0 saw no orientation in XMP
                height, width = width, height
        fault = find_fault(header, (height, width))
        if fault is not None:
            return fault
        if decoder is Decoder.PILLOW or image in self._as_bitmap:
            try:
                encoded = to_bitmap(encoded, self._decoding.background)
            except UndecodableError as error:
                return str(error)
        return (height, width), encoded
