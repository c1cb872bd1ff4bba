"""Tiny networks of transformers with random weights, written as folders."""

from pathlib import Path
from typing import Any

import torch

# name, width, pixels of a patch
SMALL = (("dinov2", 32, 14), ("siglip", 32, 8), ("convnextv2", 16, 32), ("swin", 32, 32))


def write_outside(folder: Path, name: str) -> tuple[Path, Any]:
    """The folder of a network, and the network."""
    import transformers

    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    image = {**shared, "intermediate_size": 64, "image_size": 56}
    text = {**shared, "intermediate_size": 64, "vocab_size": 50}
    small = {
        "dinov2": lambda: transformers.Dinov2Config(**shared, image_size=56, patch_size=14),
        "siglip": lambda: transformers.SiglipConfig(
            text_config=text, vision_config={**image, "patch_size": 8}
        ),
        "convnextv2": lambda: transformers.ConvNextV2Config(
            hidden_sizes=[4, 8, 8, 16], depths=[1, 1, 1, 1], image_size=64
        ),
        "swin": lambda: transformers.SwinConfig(
            embed_dim=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], image_size=64, window_size=2
        ),
        "bert": lambda: transformers.BertConfig(**text),
    }
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(small[name]()).eval()
    model.save_pretrained(folder)
    return folder, model
