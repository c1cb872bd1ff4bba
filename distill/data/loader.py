"""A rank's share of every batch, decoded ahead of the caller.

The loader owns a DALI pipeline and the feed in front of it. What a step holds is a function of
(seed, step, positions); going to any step is a rebuild, not a replay. Positions may change from step
to step: the pipeline is built for the most there are.

An image that passed the feed's checks and still cannot be decoded makes the pipeline unusable. Then each
image in it is decoded alone, the culprit is marked, and the same step is prepared again without it.
"""

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from distill.data.crops import NUM_GLOBAL, CropSchedule, CropSpec, source_outputs
from distill.data.feed import Feed, Prepared
from teacher.batch import CropBatch

PREFETCH = 2  # batches decoded ahead of the caller


class Loader:
    """Crops of some positions of each step's global batch. ``wait_s`` sums the time spent blocked.

    Args:
        feed: images and crop parameters, step by step.
        crops: what is cut.
        max_images: the most positions of any step; none are ever wanted where it is 0.
        num_threads: of the decoder.
        device: where the crops go.
    """

    def __init__(
        self,
        feed: Feed,
        crops: CropSchedule,
        *,
        max_images: int,
        num_threads: int,
        device: torch.device,
    ) -> None:
        self._feed, self._crops, self._max_images = feed, crops, max_images
        self._num_threads, self._device = num_threads, device
        self._device_id = device.index if device.type == "cuda" else None
        self._pipeline: Any = None
        self._in_pipeline: list[Prepared] = []
        self.wait_s = 0.0

    def fetch(self, step: int) -> CropBatch:
        """The crops of one step; the steps after it are prepared meanwhile.

        Raises:
            DataError: too many images cannot be used, or a source is gone.
        """
        spec = self._crops.at(step)
        if not len(self._feed.positions(step)):
            return self._nothing(spec)
        started = time.perf_counter()
        outputs, colours = self._run(step)
        num_crops = spec.num_crops
        batch = CropBatch(
            global_crops=torch.stack(outputs[:NUM_GLOBAL], dim=1),
            local_crops=self._stack_locals(spec, outputs[NUM_GLOBAL:num_crops], len(outputs[0])),
            anchor_crops=torch.stack(outputs[num_crops:], dim=1) if outputs[num_crops:] else None,
            colours=None if colours is None else torch.from_numpy(colours).to(self._device),
        )
        self.wait_s += time.perf_counter() - started
        return batch

    def make_room(self, max_images: int) -> None:
        """Allows for more positions per step; the pipeline is rebuilt if it was made for fewer."""
        if max_images > self._max_images:
            self._max_images = max_images
            self._drop()

    def close(self) -> None:
        """Lets go of the pipeline and of all threads."""
        self._drop()
        self._feed.close()

    def _drop(self) -> None:
        self._pipeline, self._in_pipeline = None, []

    def _run(self, step: int) -> tuple[list[Tensor], NDArray[np.float32] | None]:
        """The decoder's outputs for a step, without images that it refuses, and the sources' colours."""
        while True:
            if self._pipeline is None:
                self._rebuild(step)
            try:
                outputs = self._pipeline.run()
            except RuntimeError:
                if not self._find_refused():
                    raise
                self._drop()
                continue
            prepared = self._in_pipeline.pop(0)
            if prepared.step == step and prepared.positions == self._feed.positions(step):
                return [from_dlpack(output.as_tensor()) for output in outputs], prepared.colours
            self._drop()  # another step is wanted, or other positions than when it was prepared

    def _rebuild(self, step: int) -> None:
        from distill.data.pipeline import build_pipeline  # what only plans needs no decoder

        self._feed.start(step)
        self._pipeline = build_pipeline(
            self._crops.graph,
            self._next,
            self._max_images,
            self._num_threads,
            self._device_id,
            PREFETCH,
        )

    def _next(self) -> tuple[Any, ...]:
        """The next step's images and parameters; called by DALI ahead of ``fetch``."""
        prepared = self._feed.take()
        if prepared is None:  # DALI works ahead: something that nobody will fetch
            prepared = self._in_pipeline[-1]
        self._in_pipeline.append(prepared)
        return source_outputs(prepared.encoded, prepared.parameters, self._crops.at(prepared.step))

    def _find_refused(self) -> bool:
        """Tells the feed which images in the pipeline cannot be decoded; False when all can."""
        from distill.data.pipeline import find_refused

        images = {
            int(image): encoded
            for prepared in self._in_pipeline
            for image, encoded in zip(prepared.ids, prepared.encoded, strict=True)
        }
        refused = find_refused(list(images.values()), self._device_id)
        for number in refused:
            self._feed.refuse(*list(images.items())[number])
        return bool(refused)

    def _stack_locals(self, spec: CropSpec, crops: list[Tensor], num_images: int) -> Tensor:
        if crops:
            return torch.stack(crops, dim=1)
        size = spec.local_size
        return torch.empty(num_images, 0, 3, size, size, dtype=torch.uint8, device=self._device)

    def _nothing(self, spec: CropSpec) -> CropBatch:
        """No images, with the right shapes for an exchange."""

        def empty(num_crops: int, size: int) -> Tensor:
            return torch.empty(0, num_crops, 3, size, size, dtype=torch.uint8, device=self._device)

        return CropBatch(
            empty(NUM_GLOBAL, spec.global_size),
            empty(spec.num_local, spec.local_size),
            None if spec.anchor_size is None else empty(NUM_GLOBAL, spec.anchor_size),
            torch.empty(0, 2, 3, device=self._device) if self._feed.has_colours else None,
        )
