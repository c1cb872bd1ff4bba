"""The verification of an export: the same images through our network and through the library the files are for.

    ours    = features of our network, fp32, with the weights rounded to the dtype of the files
    theirs  = features that the other library computes from the files just written
    passes when no number of any class or patch feature differs by more than 1e-4 of the largest of ours

Images of two sizes are used, one of them not square, because a position embedding that mixes up
rows and columns is right on squares. The images are noise with a fixed seed: whatever goes in must
come out the same. Networks whose blocks still add next to nothing (LayerScale at its initial value)
verify little about what is inside the blocks.

Only a library that is installed can check; nothing here is needed to write the files.
"""

import importlib
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from distill.export.exporter import Exporter
from distill.weights.load import load_backbone

# Of the largest feature, which is 4 behind a norm and 1,000 in some networks: fp32 in another order of additions
# gives 2e-5 at most, a wrong tensor 2e-3 and more
TOLERANCE = 1e-4
GRIDS = ((7, 7), (5, 9))  # patches down and across
IMAGES_PER_GRID = 2
SEED = 0

ClassTokens = Float[Tensor, "images width"]
PatchTokens = Float[Tensor, "images _ width"]  # as many patches as the grid has
Pixels = Float[Tensor, "images channels _ _"]
Features = list[tuple[ClassTokens, PatchTokens]]  # of each grid


@dataclass(frozen=True)
class Parity:
    """What the verification found: the largest differences in parts of the largest feature, or why nothing could be compared."""

    checked_with: str | None
    reason: str = ""
    class_token: float | None = None
    patch_tokens: float | None = None

    @property
    def is_mismatch(self) -> bool:
        """The library was there and the features differ, or it could not read the files."""
        if self.checked_with is None:
            return False
        differences = (self.class_token, self.patch_tokens)
        return any(each is None or not each <= TOLERANCE for each in differences)

    def describe(self) -> str:
        """One clause for people."""
        if self.checked_with is None:
            return f"not checked: {self.reason}"
        if self.class_token is None or self.patch_tokens is None:
            return f"{self.checked_with} cannot use the files: {self.reason}"
        return (
            f"class features differ by at most {self.class_token:.1e} and patch features by at most "
            f"{self.patch_tokens:.1e} of the largest one in {self.checked_with}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything needed to judge the figure; infinite and NaN differences as text."""
        found = {"class_token": self.class_token, "patch_tokens": self.patch_tokens}
        return {
            "checked_with": self.checked_with,
            "reason": self.reason or None,
            "largest_difference": {
                name: value if value is None or math.isfinite(value) else str(value)
                for name, value in found.items()
            },
            "difference_unit": "largest feature of ours",
            "tolerance": TOLERANCE,
            "images": f"{IMAGES_PER_GRID} each of " + " and ".join(f"{h} x {w}" for h, w in GRIDS),
            "images_unit": "patches",
        }


def probes(stride: int, channels: int) -> list[Pixels]:
    """The images of the verification: noise with mean 0 and spread 1, as normalised pixels have."""
    generator = torch.Generator().manual_seed(SEED)
    return [
        torch.randn(IMAGES_PER_GRID, channels, rows * stride, columns * stride, generator=generator)
        for rows, columns in GRIDS
    ]


@torch.inference_mode()
def our_features(source: Path, dtype: torch.dtype) -> Features:
    """What files with weights in ``dtype`` must reproduce: our network with rounded weights, fp32."""
    backbone, spec = load_backbone(source)
    for tensor in backbone.state_dict().values():
        tensor.copy_(tensor.to(dtype))
    backbone.eval()
    found = [backbone(pixels) for pixels in probes(spec.stride, spec.in_channels)]
    return [(each.class_token, each.patch_tokens) for each in found]


def verify(exporter: Exporter, written: Path, source: Path, dtype: torch.dtype) -> Parity:
    """Reads ``written`` with the library of its format and compares features with our network."""
    library = exporter.reader
    if library is None:
        name = f"distill's reader ({exporter.library} is no package to install)"
    else:
        if importlib.util.find_spec(library) is None:
            return Parity(None, f"{library} is not installed")
        try:
            module = importlib.import_module(library)
            name = f"{library} {module.__version__}"
            if exporter.reader_part:  # some parts are imported only when first touched
                getattr(module, exporter.reader_part)
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
            return Parity(None, f"{library} does not import here ({_first_line(error)})")
    expected = our_features(source, dtype)
    try:
        found = largest_differences(expected, _their_features(exporter, written, source))
    except Exception as error:  # whatever another library raises, the files are of no use to it
        return Parity(name, f"{type(error).__name__}: {_first_line(error)}")
    return Parity(name, "", *found)


def largest_differences(
    ours: Features, theirs: Sequence[tuple[Tensor, Tensor]]
) -> tuple[float, float]:
    """Largest difference of class features and of patch features in parts of the largest of ours; NaN if one is NaN.

    What comes from elsewhere may have any shape, so it is compared here and not in the signature.

    Raises:
        ValueError: shapes differ.
    """
    found = []
    for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        for left, right in zip(mine, other, strict=True):
            if left.shape != right.shape:
                raise ValueError(f"features of shape {list(right.shape)}, ours {list(left.shape)}")
        left, right = (
            torch.cat([each.flatten() for each in part]).double() for part in (mine, other)
        )
        largest, size = float((left - right).abs().max()), float(left.abs().max())
        found.append(largest / size if size else largest)
    return found[0], found[1]


@torch.inference_mode()
def _their_features(exporter: Exporter, written: Path, source: Path) -> Features:
    spec = load_backbone(source)[1]
    forward = exporter.read_back(written, spec.stride)
    return [forward(pixels) for pixels in probes(spec.stride, spec.in_channels)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
