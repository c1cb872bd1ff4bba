"""A rank's share of every batch, decoded ahead of the caller.

The loader owns a DALI pipeline, the feed in front of it, and a thread that runs it, so that the
caller waits neither for the decoder nor for handing it its inputs. What a step holds is a function
of (seed, step, positions); going to any step is a rebuild, not a replay. Positions may change from
step to step: the pipeline is built for the most there are.

Images are decoded by the CPU, whatever computes: a GPU needs some 30 images/s, which one core decodes.
Their crops then lie in page-locked memory, from which a GPU copies while the caller goes on.

An image that passed the feed's checks and still cannot be decoded, or comes out in another size than in
the index, makes the pipeline unusable. Then each image in it is decoded alone, the culprit is marked, and the same
step is prepared again: Pillow decodes it, or another takes its place.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from distill.data.crops import NUM_GLOBAL, CropSchedule, CropSpec, source_outputs
from distill.data.feed import PREPARED, Feed, Prepared
from distill.errors import SetupError
from teacher.batch import CropBatch, onto, use_device

PREFETCH = 2  # batches in the decoder, beside the one that waits for the caller
STEPS_AHEAD = PREPARED + PREFETCH + 1  # of the caller: other positions for these cost a rebuild
Batch = tuple[Prepared, list[Tensor]]  # what was requested, and the crops


class Loader:
    """Crops of some positions of each step's global batch. ``wait_s`` sums the time spent blocked.

    Args:
        feed: images and crop parameters, step by step.
        crops: what is cut.
        max_images: the most positions of any step; none are ever wanted where it is 0.
        num_threads: of the decoder.
        device: where the crops go.
        decode: what decodes: "gpu" is ``device``, whose pixels differ by a level or two.
    """

    def __init__(
        self,
        feed: Feed,
        crops: CropSchedule,
        *,
        max_images: int,
        num_threads: int,
        device: torch.device,
        decode: Literal["cpu", "gpu"] = "cpu",
    ) -> None:
        self._feed, self._crops, self._max_images = feed, crops, max_images
        self._has_locals = crops.graph.num_local > 0
        self._has_anchors = crops.graph.anchor_size is not None
        self._num_threads, self._device = num_threads, device
        self._device_id = device.index if decode == "gpu" else None  # None: the CPU decodes
        self._is_pinned = device.type == "cuda" and decode == "cpu"
        self._pipeline: Any = None
        self._in_pipeline: list[Prepared] = []  # as the pipeline, the thread's while it runs
        self._running = ThreadPoolExecutor(1, "decode", use_device, (device,))
        on_cpu = self._device_id is None and num_threads > 1
        self._resizing = ThreadPoolExecutor(num_threads, "resize") if on_cpu else None
        self._ahead: Future[Batch] | None = None
        self._copying: tuple[torch.cuda.Event, list[Tensor]] | None = None
        self.wait_s = 0.0

    def fetch(self, step: int) -> CropBatch:
        """The crops of one step; the steps after it are prepared meanwhile.

        Raises:
            DataError: too many images cannot be used, or a source is gone.
            StorageError: the storage has refused an image for minutes.
            SetupError: the GPU's decoder cannot be built.
        """
        positions = self._feed.positions(step)
        if not len(positions):
            return self._nothing(self._crops.at(step))
        started = time.perf_counter()
        prepared, outputs = self._take(step, positions)
        self.wait_s += time.perf_counter() - started
        if self._device_id is not None:
            outputs = self._copied(outputs)
        # torch reuses page-locked memory only after the copies out of it; on a CPU nothing is copied
        outputs = [output.to(self._device, non_blocking=True) for output in outputs]
        anchors = outputs.pop() if self._has_anchors else None
        pixel_stats = prepared.pixel_stats
        return CropBatch(
            global_crops=outputs[0],
            local_crops=outputs[1]
            if self._has_locals
            else self._empty(len(outputs[0]), 0, self._crops.at(step).local_size),
            anchor_crops=anchors,
            pixel_stats=None
            if pixel_stats is None
            else onto(torch.from_numpy(pixel_stats), self._device),
        )

    def _copied(self, outputs: list[Tensor]) -> list[Tensor]:
        """Memory of torch, which it reuses in the order of the GPU's work, in the place of the GPU decoder's.

        The decoder writes anew into what is let go of, whatever the GPU still has to do with it. So its
        outputs are held until they are copied: until the next step, when that was long ago.
        """
        if self._copying is not None:
            self._copying[0].synchronize()
        copies = [output.clone() for output in outputs]
        self._copying = torch.cuda.current_stream(self._device).record_event(), outputs
        return copies

    def make_room(self, max_images: int) -> None:
        """Allows for more positions per step; the pipeline is rebuilt if it was made for fewer."""
        if max_images > self._max_images:
            self._max_images = max_images
            self._drop()

    def close(self) -> None:
        """Lets go of the pipeline and of all threads."""
        self._drop()
        self._running.shutdown()
        if self._resizing is not None:
            self._resizing.shutdown()
        self._feed.close()

    def _drop(self) -> None:
        if self._ahead is not None:
            wait([self._ahead])
        self._pipeline, self._in_pipeline, self._ahead = None, [], None

    def _take(self, step: int, positions: range) -> Batch:
        """A step without images that the decoder refuses; the thread goes on with the next."""
        while True:
            if self._ahead is None:
                self._rebuild(step)
                self._ahead = self._running.submit(self._run)
            try:
                batch = self._ahead.result()
            except RuntimeError:
                if not self._find_refused():
                    raise
                self._drop()
                continue
            if batch[0].step == step and batch[0].positions == positions:
                self._ahead = self._running.submit(self._run)
                return batch
            self._drop()  # another step is wanted, or other positions than when it was prepared

    def _run(self) -> Batch:
        """The decoder's next batch. The thread's work."""
        outputs = [from_dlpack(output.as_tensor()) for output in self._pipeline.run()]
        if self._is_pinned:
            outputs = [output.pin_memory() for output in outputs]
        return self._in_pipeline.pop(0), outputs

    def _rebuild(self, step: int) -> None:
        from distill.data.pipeline import build_pipeline  # what only plans needs no decoder

        self._feed.start(step)
        try:
            self._pipeline = build_pipeline(
                self._crops.graph,
                self._next,
                self._max_images,
                self._num_threads,
                self._device_id,
                PREFETCH,
                self._resizing,
            )
        except RuntimeError as error:
            if self._device_id is None:
                raise
            raise refused_gpu(str(error)) from error

    def _next(self) -> tuple[Any, ...]:
        """The next step's images and parameters; called by DALI, on the thread."""
        prepared = self._feed.take()
        if prepared is None:  # DALI works ahead: something that will not be fetched
            prepared = self._in_pipeline[-1]
        self._in_pipeline.append(prepared)
        return source_outputs(prepared.encoded, prepared.parameters, self._crops.at(prepared.step))

    def _find_refused(self) -> bool:
        """Reports to the feed which images in the pipeline cannot be decoded; False when all can."""
        from distill.data.pipeline import find_refused

        images = {
            int(image): (encoded, (int(height), int(width)))
            for prepared in self._in_pipeline
            for image, encoded, (height, width) in zip(
                prepared.ids, prepared.encoded, prepared.hw, strict=True
            )
        }
        refused = find_refused(list(images.values()))
        for index in refused:
            image, (encoded, _) = list(images.items())[index]
            self._feed.refuse(image, encoded)
        return bool(refused)

    def _nothing(self, spec: CropSpec) -> CropBatch:
        """No images, with the right shapes for an exchange."""
        anchors = spec.anchor_size
        return CropBatch(
            self._empty(0, NUM_GLOBAL, spec.global_size),
            self._empty(0, spec.num_local, spec.local_size),
            None if anchors is None else self._empty(0, NUM_GLOBAL, anchors),
            torch.empty(0, 2, 3, device=self._device) if self._feed.has_pixel_stats else None,
        )

    def _empty(self, num_images: int, num_crops: int, size: int) -> Tensor:
        shape = (num_images, num_crops, 3, size, size)
        return torch.empty(shape, dtype=torch.uint8, device=self._device)


def refused_gpu(reason: str) -> SetupError:
    """The error for a GPU that does not decode; it is no reason to decode elsewhere, which gives other pixels under the same hash."""
    line = (reason.splitlines() or ["no reason given"])[0]
    return SetupError(
        f"data.decode = gpu: the GPU's decoder cannot be used here ({line})",
        fix="Write data.decode=cpu, the default: one core decodes more than a GPU trains on.",
    )
