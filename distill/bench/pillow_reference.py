"""The crops of one image by Pillow alone: what the decoder's graph is compared with, in results and in speed.

The same windows and parameters, the usual operations of torchvision's augmentation on Pillow images: enhance
brightness, contrast (about the mean grey) and saturation, turn the hue in HSV, blur, solarise. The blur is
Pillow's (three box filters that come near a Gaussian) or, as in torchvision, a convolution with nine taps
in torch.
"""

from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from distill.data.crops import NUM_GLOBAL, CropParameters, CropSpec
from distill.listing.decode import decode_rgb

SOLARISE_THRESHOLD = 128
TAPS = 9


class Blur(Enum):
    """Which blur."""

    BOXES = "Pillow"
    TAPS = "torchvision's way"


def cut(
    encoded: NDArray[np.uint8], parameters: CropParameters, index: int, spec: CropSpec, blur: Blur
) -> list[NDArray[np.uint8]]:
    """Global, local and anchor crops of image ``index`` of the parameters, [height, width, 3] each."""
    image = Image.fromarray(decode_rgb(encoded, None))  # clear ones came as a bitmap
    crops, anchors = [], []
    pairs = zip(parameters.windows[index], parameters.photometric[index], strict=True)
    for crop, (window, photometric) in enumerate(pairs):
        is_global = crop < NUM_GLOBAL
        size = spec.global_size if is_global else spec.local_size
        resized = _resize(image, window, size)
        if is_global and spec.anchor_size is not None:
            larger = _resize(image, window, spec.anchor_size)
            anchors.append(np.asarray(larger))
            if spec.reduces_anchors:
                resized = larger.resize((size, size), Image.Resampling.BICUBIC)
        crops.append(np.asarray(_distort(resized, photometric, blur)))
    return [*crops, *anchors]


def _resize(image: Image.Image, window: NDArray[np.float32], size: int) -> Image.Image:
    top, left, bottom, right = window.tolist()
    box = (min(left, right), top, max(left, right), bottom)
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return ImageOps.mirror(resized) if left > right else resized


def _distort(crop: Image.Image, photometric: NDArray[np.float32], blur: Blur) -> Image.Image:
    brightness, contrast, saturation, hue, sigma, solarises = photometric.tolist()
    for kind, factor in (
        (ImageEnhance.Brightness, brightness),
        (ImageEnhance.Contrast, contrast),
        (ImageEnhance.Color, saturation),
    ):
        if factor != 1.0:
            crop = kind(crop).enhance(factor)
    if hue:
        planes = list(crop.convert("HSV").split())
        turned = np.asarray(planes[0]).astype(np.int16) + round(hue * 255 / 360)
        planes[0] = Image.fromarray((turned % 256).astype(np.uint8))
        crop = Image.merge("HSV", planes).convert("RGB")
    if sigma:
        boxes = blur is Blur.BOXES
        crop = crop.filter(ImageFilter.GaussianBlur(sigma)) if boxes else _convolve(crop, sigma)
    return ImageOps.solarize(crop, SOLARISE_THRESHOLD) if solarises else crop


def _convolve(crop: Image.Image, sigma: float) -> Image.Image:
    """A Gaussian of nine taps, its edges reflected, one colour at a time, as torchvision does it."""
    half = torch.arange(TAPS) - TAPS // 2
    line = torch.softmax(-0.5 * (half / sigma) ** 2, dim=0)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None].float()
    padded = torch.nn.functional.pad(pixels, [TAPS // 2] * 4, mode="reflect")
    kernel = torch.outer(line, line).expand(3, 1, TAPS, TAPS)
    blurred = torch.nn.functional.conv2d(padded, kernel, groups=3)[0]
    return Image.fromarray(blurred.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())
