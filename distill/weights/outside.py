"""Vision backbones of transformers in a local folder, as networks to look at; nothing is downloaded and no code of a folder runs."""

import importlib
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.errors import CheckpointError, SetupError
from distill.weights.containers import read_object
from distill.weights.hf_config import MODEL_TYPES
from distill.weights.load import CONFIG
from teacher.batch import Features

MOST_PREFIX = 64  # class and register tokens in front of the patches
HALVINGS = (1, 2, 4, 8)  # of the patch grid, where a network has stages


class OutsideNetwork(nn.Module):
    """A vision model of transformers that satisfies ``teacher.batch.Backbone``: its last hidden state on the patch grid.

    Learned positions are interpolated to the size of the picture where the model can.
    """

    def __init__(self, model: nn.Module, path: Path) -> None:
        super().__init__()
        self.model, self._path = getattr(model, "vision_model", model), path
        config: Any = getattr(model.config, "vision_config", None) or model.config
        accepted = inspect.signature(self.model.forward).parameters
        can_resize = "interpolate_pos_encoding" in accepted
        self._options = {"interpolate_pos_encoding": True} if can_resize else {}
        self.patch = int(getattr(config, "patch_size", 0) or 1)
        side = int(getattr(config, "image_size", 0) or 224)
        side = max(self.patch, side // self.patch * self.patch)
        hidden = self._hidden(torch.zeros(1, 3, side, side))
        self.stride = self._stride(hidden, side)
        self.width = int(hidden.shape[1] if hidden.ndim == 4 else hidden.shape[2])

    @torch.inference_mode()
    def _hidden(self, pixels: Tensor) -> Tensor:
        try:
            found = self.model(pixel_values=pixels, **self._options)
            hidden = getattr(found, "last_hidden_state", None)
        except (TypeError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise _not_a_backbone(self._path, reason) from error
        if not isinstance(hidden, Tensor) or hidden.ndim not in (3, 4):
            raise _not_a_backbone(self._path, "it has no last hidden state of an image")
        return hidden

    def _stride(self, hidden: Tensor, side: int) -> int:
        if hidden.ndim == 4:
            return side // int(hidden.shape[2])
        for halving in HALVINGS:
            stride = self.patch * halving
            left = hidden.shape[1] - (side // stride) ** 2
            if side % stride == 0 and 0 <= left <= MOST_PREFIX:
                return stride
        raise _not_a_backbone(self._path, f"{hidden.shape[1]} tokens are no grid of patches")

    def forward(
        self,
        pixels: Float[Tensor, "rows channels height width"],
        masks: None = None,  # noqa: ARG002  # part of the protocol
        *,
        rope_scale: float = 1.0,  # noqa: ARG002  # part of the protocol
        is_local: bool = False,  # noqa: ARG002  # part of the protocol
    ) -> Features:
        """Mean of the patches, and the patches."""
        hidden = self._hidden(pixels)
        if hidden.ndim == 4:
            grid_hw = (int(hidden.shape[2]), int(hidden.shape[3]))
            patches = hidden.flatten(2).transpose(1, 2)
        else:
            grid_hw = (pixels.shape[2] // self.stride, pixels.shape[3] // self.stride)
            patches = hidden[:, hidden.shape[1] - grid_hw[0] * grid_hw[1] :]
        return Features(patches.mean(1), patches, grid_hw)


def is_outside(path: Path) -> bool:
    """Whether a folder's config is of another network of transformers."""
    config = path / CONFIG
    kind = read_object(config).get("model_type") if config.is_file() else None
    return isinstance(kind, str) and kind not in MODEL_TYPES


def load_outside(path: Path) -> OutsideNetwork:
    """The vision model in a folder, in fp32 and evaluation mode.

    Raises:
        SetupError: transformers is not installed.
        CheckpointError: it cannot be loaded, or is no vision backbone with a grid of patches.
    """
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise SetupError(
            f"{path}: a network of transformers, which cannot be imported ({error})",
            fix="pip install transformers",
        ) from error
    try:
        with _silent(library.utils.logging):
            model = library.AutoModel.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False, dtype=torch.float32
            )
    except (ValueError, OSError, KeyError, ImportError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: transformers cannot load it ({reason})",
            fix="Give a folder of config.json and model.safetensors that AutoModel loads.",
        ) from error
    return OutsideNetwork(model.eval(), path).eval()


@contextmanager
def _silent(switches: Any) -> Iterator[None]:
    """Without the tables and bars that transformers prints while it loads."""
    had_bars = switches.is_progress_bar_enabled()
    switches.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        if had_bars:
            switches.enable_progress_bar()


def _not_a_backbone(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a vision backbone with a grid of patches ({reason})",
        fix="Give a ViT or a ConvNet of transformers, such as DINOv2 or SigLIP.",
    )
