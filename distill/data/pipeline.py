"""The DALI graph: decode once, cut every crop, apply the parameters it is given. It draws nothing at random.

Fixed order of operations per crop: resize of the window (cubic, antialiased; a swapped window
mirrors), colour, blur, solarise. Conditionals split the batch, so a crop that is not blurred costs
no blur.

Departures from torchvision, by DALI's definitions: contrast turns about 128 instead of the image's
mean grey; hue is a rotation in YIQ instead of HSV; the order of the colour operations is fixed.
"""

from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import pipeline_def

from distill.data.crops import NUM_GLOBAL, CropSpec

Source = Callable[[], tuple[Any, ...]]
BLUR_WINDOW = 9  # pixels; torchvision's kernel in the published augmentation
BLUR_OFFSETS = np.arange(BLUR_WINDOW, dtype=np.float32) - BLUR_WINDOW // 2
SOLARISE_THRESHOLD = 128


def build_pipeline(
    spec: CropSpec,
    source: Source,
    batch: int,
    num_threads: int,
    device_id: int | None,
    prefetch: int,
) -> Any:
    """A built pipeline whose outputs are global, local and anchor crops, those there are, each uint8 [images, crops, 3, height, width].

    ``source`` gives what ``source_outputs`` makes of a batch; of ``spec`` only the numbers of crops
    count, sizes come with each batch.
    """
    num_crops, num_sizes = spec.num_crops, len(spec.sizes)

    @pipeline_def(
        batch_size=batch,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        enable_conditionals=True,
    )
    @no_type_check  # DALI rewrites this function's source and cannot look through a run-time type checker
    def graph() -> tuple[Any, ...]:
        encoded, *inputs = fn.external_source(
            source=source, num_outputs=1 + num_sizes + 2 * num_crops, batch=True
        )
        sizes, parameters = inputs[:num_sizes], inputs[num_sizes:]
        image = _decode(encoded, device_id)
        crops, anchors = [], []  # height, width, channel
        for crop in range(num_crops):
            window, photometric = parameters[crop], parameters[num_crops + crop]
            is_global = crop < NUM_GLOBAL
            resized = _resize(image, window, sizes[0] if is_global else sizes[1])
            crops.append(_distort(resized, photometric, device_id, can_solarise=crop == 1))
            if is_global and spec.anchor_size is not None:
                anchors.append(_resize(image, window, sizes[-1]))
        kinds = crops[:NUM_GLOBAL], crops[NUM_GLOBAL:], anchors
        return tuple(fn.transpose(fn.stack(*kind), perm=[0, 3, 1, 2]) for kind in kinds if kind)

    pipeline = graph()
    pipeline.build()
    return pipeline


@no_type_check
def _resize(image: Any, window: Any, size: Any) -> Any:
    return fn.resize(
        image,
        roi_start=window[:2],
        roi_end=window[2:],
        size=size,
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )


@no_type_check
def _distort(crop: Any, photometric: Any, device_id: int | None, *, can_solarise: bool) -> Any:
    brightness, contrast, saturation, hue = (photometric[i] for i in range(4))
    if (brightness != 1.0) | (contrast != 1.0) | (saturation != 1.0) | (hue != 0.0):
        crop = fn.color_twist(
            crop, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
        )
    if photometric[4] > 0.0:
        crop = _blur(crop, photometric[4], device_id)
    if can_solarise:  # noqa: SIM102  # decided in Python, the next line per sample in the graph
        if photometric[5] > 0.5:
            keep = crop < SOLARISE_THRESHOLD
            crop = keep * crop + (keep ^ True) * (types.Constant(255, dtype=types.UINT8) - crop)
    return crop


@no_type_check
def _blur(crop: Any, sigma: Any, device_id: int | None) -> Any:
    """Gaussian of nine taps, borders mirrored.

    On a CPU DALI's own takes six times as long as its filter along each axis, whose two roundings
    differ from one by a level.
    """
    if device_id is not None:
        return fn.gaussian_blur(crop, window_size=BLUR_WINDOW, sigma=sigma)
    taps = math.exp(types.Constant(-0.5 * BLUR_OFFSETS**2) / (sigma * sigma))
    taps = taps / fn.reductions.sum(taps)
    across, down = (fn.reshape(taps, shape=shape) for shape in ([1, BLUR_WINDOW], [BLUR_WINDOW, 1]))
    return fn.filter(fn.filter(crop, across), down)


def find_refused(encoded: Sequence[NDArray[np.uint8]], device_id: int | None) -> list[int]:
    """Numbers of the images that the decoder cannot decode; each is tried alone."""
    refused = []
    for number, image in enumerate(encoded):

        @pipeline_def(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
        @no_type_check  # as above
        def alone(image: NDArray[np.uint8] = image) -> Any:
            one = fn.external_source(source=lambda: [image], batch=True)
            return _decode(one, device_id)

        pipeline = alone()
        pipeline.build()
        try:
            pipeline.run()
        except RuntimeError:
            refused.append(number)
    return refused


@no_type_check
def _decode(encoded: Any, device_id: int | None) -> Any:
    return fn.decoders.image(
        encoded, device="cpu" if device_id is None else "mixed", output_type=types.RGB
    )
