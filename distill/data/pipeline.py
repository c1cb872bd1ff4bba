"""The DALI graph: decode once, cut every crop, apply the parameters it is given. It draws nothing at random.

Fixed order of operations per crop: resize of the window (cubic, antialiased; a swapped window
mirrors; on a CPU by torch, ``distill.data.resize``), colour, blur, solarise. Conditionals split the batch, so a crop that is not blurred costs
no blur.

Contrast turns about the crop's mean grey, as in torchvision, or about 128 (``CropSpec.contrast_about``).
Departures from torchvision: hue is a rotation in YIQ instead of HSV; the order of the colour operations is fixed.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any, no_type_check

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import pipeline_def

from distill.data.crops import NUM_GLOBAL, CropSpec
from distill.data.resize import resizer

Source = Callable[[], tuple[Any, ...]]
BLUR_WINDOW = 9  # pixels; torchvision's kernel in the published augmentation
BLUR_OFFSETS = np.arange(BLUR_WINDOW, dtype=np.float32) - BLUR_WINDOW // 2
SOLARISE_THRESHOLD = 128
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue in grey, as in Pillow


def build_pipeline(
    spec: CropSpec,
    source: Source,
    batch: int,
    num_threads: int,
    device_id: int | None,
    prefetch: int,
    resizing: Executor | None = None,
) -> Any:
    """A built pipeline whose outputs are global, local and anchor crops, those there are, each uint8 [images, crops, 3, height, width].

    ``source`` gives what ``source_outputs`` makes of a batch; of ``spec`` only the numbers of crops,
    ``contrast_about`` and ``reduces_anchors`` count, sizes come with each batch. ``resizing``: threads that resize beside the calling one's, on a CPU.
    """
    num_crops, num_sizes = spec.num_crops, len(spec.sizes)
    num_anchors = NUM_GLOBAL if spec.anchor_size is not None else 0
    num_reduced = num_anchors if spec.reduces_anchors else 0
    # made out here: what is made inside the graph DALI rewrites too
    make = resizer(num_crops + num_anchors, resizing, num_reduced)
    on_cpu = make if device_id is None else None

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
        sizes = inputs[:num_sizes]
        windows, photometric = inputs[num_sizes : num_sizes + num_crops], inputs[-num_crops:]
        wanted = [sizes[0 if crop < NUM_GLOBAL else 1] for crop in range(num_crops)]
        wanted += [sizes[-1]] * num_anchors
        cut = [*windows, *windows[:num_anchors]]
        resized = _resize(_decode(encoded, device_id), wanted, cut, on_cpu, num_reduced)
        crops = [  # height, width, channel
            _distort(
                _recolour(resized[crop], photometric[crop], spec.contrast_about, device_id),
                photometric[crop],
                device_id,
                can_solarise=crop == 1,
            )
            for crop in range(num_crops)
        ]
        kinds = crops[:NUM_GLOBAL], crops[NUM_GLOBAL:], resized[num_crops:]
        return tuple(fn.transpose(fn.stack(*kind), perm=[0, 3, 1, 2]) for kind in kinds if kind)

    pipeline = graph()
    pipeline.build()
    return pipeline


@no_type_check
def _resize(
    image: Any,
    sizes: list[Any],
    windows: list[Any],
    on_cpu: Callable[..., Any] | None,
    num_reduced: int,
) -> list[Any]:
    """Every window at its size; the first ``num_reduced`` are made of as many last ones."""
    if on_cpu is not None:
        count = len(windows)
        return fn.python_function(
            image,
            *sizes,
            *windows,
            function=on_cpu,
            num_outputs=count,
            batch_processing=True,
            output_layouts=["HWC"] * count,
        )
    made = [
        fn.resize(
            image,
            roi_start=window[:2],
            roi_end=window[2:],
            size=size,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )
        for size, window in list(zip(sizes, windows))[num_reduced:]  # noqa: B905  # DALI's zip takes no `strict`
    ]
    larger = made[len(made) - num_reduced :]
    return [
        fn.resize(crop, size=size, interp_type=types.INTERP_CUBIC, antialias=True)
        for crop, size in zip(larger, sizes)  # noqa: B905  # as above
    ] + made


@no_type_check
def _recolour(crop: Any, photometric: Any, contrast_about: str, device_id: int | None) -> Any:
    """Saturation and hue, which keep the mean grey, then contrast and brightness."""
    brightness, contrast, saturation, hue = (photometric[i] for i in range(4))
    if contrast_about == "middle":
        if (brightness != 1.0) | (contrast != 1.0) | (saturation != 1.0) | (hue != 0.0):
            crop = fn.color_twist(
                crop, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
            )
        return crop
    if (saturation != 1.0) | (hue != 0.0):
        crop = fn.color_twist(crop, saturation=saturation, hue=hue)
    if (brightness != 1.0) | (contrast != 1.0):
        crop = _contrast(crop, brightness, contrast, device_id)
    return crop


@no_type_check
def _contrast(crop: Any, brightness: Any, contrast: Any, device_id: int | None) -> Any:
    """Contrast about the mean grey, then brightness; on a GPU as arithmetic, since operators take parameters from the host only."""
    means = fn.reductions.mean(crop, axes=[0, 1])
    if device_id is None:
        grey = fn.reductions.sum(means * types.Constant(LUMA))
        return fn.brightness_contrast(
            crop, brightness=brightness, contrast=contrast, contrast_center=grey
        )
    grey = fn.reductions.sum(means * types.Constant(LUMA, device="gpu"))
    wanted = ((crop - grey) * contrast.gpu() + grey) * brightness.gpu()
    return fn.cast(math.clamp(wanted, 0.0, 255.0) + 0.5, dtype=types.UINT8)


@no_type_check
def _distort(crop: Any, photometric: Any, device_id: int | None, *, can_solarise: bool) -> Any:
    if photometric[4] > 0.0:
        crop = _blur(crop, photometric[4], device_id)
    if can_solarise:  # noqa: SIM102  # decided in Python, the next line per sample in the graph
        if photometric[5] > 0.5:
            mask = crop < SOLARISE_THRESHOLD
            crop = mask * crop + (mask ^ True) * (types.Constant(255, dtype=types.UINT8) - crop)
    return crop


@no_type_check
def _blur(crop: Any, sigma: Any, device_id: int | None) -> Any:
    """Gaussian of nine taps, borders mirrored.

    On a CPU DALI's takes six times as long as its filter along each axis, whose two roundings
    differ from one by a level.
    """
    if device_id is not None:
        return fn.gaussian_blur(crop, window_size=BLUR_WINDOW, sigma=sigma)
    taps = math.exp(types.Constant(-0.5 * BLUR_OFFSETS**2) / (sigma * sigma))
    taps = taps / fn.reductions.sum(taps)
    across, down = (fn.reshape(taps, shape=shape) for shape in ([1, BLUR_WINDOW], [BLUR_WINDOW, 1]))
    return fn.filter(fn.filter(crop, across), down)


def find_refused(images: Sequence[tuple[NDArray[np.uint8], tuple[int, int]]]) -> list[int]:
    """Indices of encoded images that the decoder cannot decode, or gives another height and width than is stated.

    Each is tried alone, on the CPU: a GPU's decoder takes seconds to build for each.
    """
    refused = []
    for index, (encoded, hw) in enumerate(images):
        try:
            is_right = decode_alone(encoded, None) == hw
        except RuntimeError:
            is_right = False
        if not is_right:
            refused.append(index)
    return refused


def decode_alone(image: NDArray[np.uint8], device_id: int | None) -> tuple[int, int]:
    """Decodes one encoded image as training does, on a GPU where ``device_id`` is its number; only its height and width are kept.

    Raises:
        RuntimeError: the decoder cannot be built, or cannot decode the image.
    """

    @pipeline_def(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    @no_type_check  # as above
    def alone() -> Any:
        one = fn.external_source(source=lambda: [image], batch=True)
        return _decode(one, device_id)

    pipeline = alone()
    pipeline.build()
    height, width, _ = pipeline.run()[0].shape()[0]
    return height, width


@no_type_check
def _decode(encoded: Any, device_id: int | None) -> Any:
    """On a GPU by its kernels alone, with the CPU's interpolation of colours.

    The hardware decoder takes a part of each batch and differs by a level, so pixels would depend on an image's place in its batch.
    """
    if device_id is None:
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
    return fn.decoders.image(
        encoded,
        device="mixed",
        output_type=types.RGB,
        hw_decoder_load=0.0,
        jpeg_fancy_upsampling=True,
    )
