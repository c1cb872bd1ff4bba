"""Hugging Face: config.json, model.safetensors and preprocessor_config.json, read by transformers."""

import importlib
from pathlib import Path

import torch
from torch import Tensor

from distill.export.card import transformers_usage
from distill.export.convert import convert
from distill.export.exporter import Exporter, Forward


def _write(name: str, source: Path, folder: Path, dtype: torch.dtype) -> None:  # noqa: ARG001  # the folder has it
    convert(source, folder, layout="hf", dtype=dtype)


def _read_back(folder: Path, stride: int) -> Forward:
    """``AutoModel`` on the folder; patches are its last tokens."""
    bars = importlib.import_module("transformers.utils.logging")
    had_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        backbone, loading = importlib.import_module("transformers").AutoModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    finally:
        if had_bars:
            bars.enable_progress_bar()
    wrong = {problem: sorted(map(str, keys)) for problem, keys in loading.items() if keys}
    if wrong:
        raise ValueError(f"not every tensor was taken: {wrong}")
    backbone.eval()

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = backbone(pixels)
        num_patches = (pixels.shape[2] // stride) * (pixels.shape[3] // stride)
        return found.pooler_output, found.last_hidden_state[:, -num_patches:]

    return forward


EXPORTER = Exporter(
    "hf",
    "transformers",
    "transformers",
    _write,
    _read_back,
    transformers_usage,
    reader_part="AutoModel",
)
