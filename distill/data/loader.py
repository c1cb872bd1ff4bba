"""A rank's share of every batch, decoded ahead of the caller.

The loader owns a DALI pipeline and the counter that feeds it. What a step holds is a function of
(seed, step, positions); going to any step is a rebuild, not a replay. Positions may change from step
to step: the pipeline is built for the most there are.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from distill.data.crops import NUM_GLOBAL, CropSpec, draw_parameters
from distill.data.index import ImageIndex, find_undecodable
from distill.data.sampler import sample_ids
from distill.errors import DataError
from teacher.batch import CropBatch


class Loader:
    """Crops of some positions of each step's global batch. ``wait_s`` sums the time spent blocked.

    Args:
        index: the images.
        crops: what is cut from them.
        seed: of order, windows and colours.
        images_global: images of a step, all ranks together.
        positions: the positions wanted at a step; may differ from step to step.
        max_images: the most positions of any step; none are ever wanted where it is 0.
        stop_step: no step from this one on is ever wanted.
        num_threads: of the decoder.
        device: where the crops go.
    """

    def __init__(
        self,
        index: ImageIndex,
        crops: CropSpec,
        *,
        seed: int,
        images_global: int,
        positions: Callable[[int], range],
        max_images: int,
        stop_step: int,
        num_threads: int,
        device: torch.device,
    ) -> None:
        self._index, self._crops, self._seed, self._images_global = (
            index,
            crops,
            seed,
            images_global,
        )
        self._positions, self._max_images, self._stop_step = positions, max_images, stop_step
        self._num_threads, self._device = num_threads, device
        self._pipeline: Any = None
        self._next_fed = self._next_fetched = self._last_fed = -1
        self.wait_s = 0.0

    def fetch(self, step: int) -> CropBatch:
        """The crops of one step; the steps after it are prepared meanwhile.

        Raises:
            DataError: an image cannot be read or decoded; names the file.
        """
        if not self._max_images:
            return self._nothing()
        started = time.perf_counter()
        try:
            if step != self._next_fetched:
                self._rebuild(step)
            if not len(self._positions(step)):
                self._next_fetched = step + 1
                return self._nothing()
            outputs = [from_dlpack(output.as_tensor()) for output in self._pipeline.run()]
        except (RuntimeError, OSError) as error:
            raise self._explain(step, error) from error
        self._next_fetched = step + 1
        num_crops = self._crops.num_crops
        batch = CropBatch(
            global_crops=torch.stack(outputs[:NUM_GLOBAL], dim=1),
            local_crops=self._stack_locals(outputs[NUM_GLOBAL:num_crops], len(outputs[0])),
            anchor_crops=torch.stack(outputs[num_crops:], dim=1) if outputs[num_crops:] else None,
        )
        self.wait_s += time.perf_counter() - started
        return batch

    def make_room(self, max_images: int) -> None:
        """Allows for more positions per step; the pipeline is rebuilt if it was made for fewer."""
        if max_images > self._max_images:
            self._max_images = max_images
            self.close()

    def close(self) -> None:
        """Lets go of the pipeline and its threads."""
        self._pipeline = None
        self._next_fetched = -1

    def _rebuild(self, step: int) -> None:
        from distill.data.pipeline import build_pipeline  # a plan needs no decoder

        self._next_fed = step
        device_id = self._device.index if self._device.type == "cuda" else None
        self._pipeline = build_pipeline(
            self._crops, self._feed, self._max_images, self._num_threads, device_id
        )

    def _feed(self) -> tuple[Any, ...]:
        """The next batch's encoded images and parameters; called by DALI ahead of ``fetch``."""
        step = self._next_fed
        while step < self._stop_step and not len(self._positions(step)):
            step += 1  # a step without images has no batch
        if step >= self._stop_step:
            step = self._last_fed  # DALI works ahead: something that nobody will fetch
        self._last_fed, self._next_fed = step, max(self._next_fed, step + 1)
        positions = self._positions(step)
        ids = self._ids(step)
        parameters = draw_parameters(
            self._crops,
            seed=self._seed,
            step=step,
            positions=np.arange(positions.start, positions.stop),
            sample_ids=ids,
            hw=self._index.hw[ids],
        )
        encoded = [np.fromfile(self._index.paths[i], np.uint8) for i in ids]
        from distill.data.pipeline import source_outputs

        return source_outputs(encoded, parameters.windows, parameters.photometric)

    def _ids(self, step: int) -> NDArray[np.int64]:
        wanted = self._positions(step)
        positions = np.arange(wanted.start, wanted.stop)
        return sample_ids(self._seed, len(self._index.paths), step, self._images_global, positions)

    def _explain(self, step: int, error: Exception) -> Exception:
        """A broken image of this batch or of those prepared after it, or the error itself when every image can be decoded."""
        self.close()
        for candidate in range(step, self._next_fed):
            found = find_undecodable([self._index.paths[i] for i in self._ids(candidate)])
            if found is not None:
                return DataError(
                    f"{found[0]}: cannot be decoded any more ({found[1]})",
                    fix="Restore or remove the file; the same command goes on from the last checkpoint.",
                )
        return error

    def _stack_locals(self, crops: list[Tensor], num_images: int) -> Tensor:
        if crops:
            return torch.stack(crops, dim=1)
        size = self._crops.local_size
        return torch.empty(num_images, 0, 3, size, size, dtype=torch.uint8, device=self._device)

    def _nothing(self) -> CropBatch:
        """No images, with the right shapes for an exchange."""

        def empty(num_crops: int, size: int) -> Tensor:
            return torch.empty(0, num_crops, 3, size, size, dtype=torch.uint8, device=self._device)

        crops = self._crops
        return CropBatch(
            empty(NUM_GLOBAL, crops.global_size),
            empty(crops.num_local, crops.local_size),
            None if crops.anchor_size is None else empty(NUM_GLOBAL, crops.anchor_size),
        )
