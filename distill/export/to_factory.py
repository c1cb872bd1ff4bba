"""A custom student for its factory: config.json names it with its arguments, model.safetensors is the state of its network.

The names of the tensors are those of the network that the factory gives, so that ``load_state_dict`` takes them
without distill. No code is copied.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.errors import CheckpointError
from distill.export.card import distill_usage
from distill.export.exporter import Exporter, Forward
from distill.export.save import write_tensors
from distill.listing.outside_code import LIBRARIES
from distill.runfolder.files import replace_text
from distill.weights.containers import read_object
from distill.weights.custom_folders import CONFIG
from distill.weights.hf_config import hf_config
from distill.weights.load import load_backbone
from students.custom import OUTER, make_network
from students.shapes import BackboneSpec


def _write(name: str, source: Path, folder: Path, dtype: torch.dtype) -> None:
    backbone, spec = load_backbone(source)
    if not spec.probe_call:
        raise CheckpointError(
            f"{name}: comes with distill, no factory makes it",
            fix="Use --to hf, timm, meta or onnx.",
        )
    folder.mkdir()
    config = {**hf_config(spec), "dtype": str(dtype).removeprefix("torch.")}
    replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    tensors = {
        name.removeprefix(OUTER): (each.to(dtype) if each.is_floating_point() else each)
        .detach()
        .clone()
        .contiguous()
        for name, each in backbone.state_dict().items()
    }
    write_tensors(folder, tensors)


def _read_back(folder: Path, stride: int) -> Forward:  # noqa: ARG001  # the map has its grid
    """The factory's network, as it gives it, with the files' tensors."""
    config = read_object(folder / CONFIG)
    with torch.random.fork_rng(devices=[]):
        network = make_network(config["factory"], config["args"])
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    network.load_state_dict(tensors)
    network.eval()

    def forward(pixels: Tensor) -> tuple[Tensor, Tensor]:
        class_feature, patch_map = network(pixels)
        return class_feature, patch_map.flatten(2).transpose(1, 2)

    return forward


def _usage(name: str, spec: BackboneSpec, files: Sequence[str]) -> list[str]:  # noqa: ARG001  # the code has the folder
    """Plain lines for a factory of a module; those of distill where a library builds the network."""
    config = hf_config(spec)
    module, _, factory = config["factory"].partition(":")
    if module in LIBRARIES:
        return distill_usage(spec)
    return [
        "from safetensors.torch import load_file",
        f"from {module} import {factory}",
        "",
        f"network = {factory}({_arguments(config['args'])})",
        'network.load_state_dict(load_file(f"{folder}/model.safetensors"))',
        "network.eval()",
        "with torch.no_grad():",
        "    class_feature, patch_map = network(pixels)  # patch_map: [images, width, rows, columns]",
    ]


def _arguments(args: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in args.items())


EXPORTER = Exporter("factory", "pytorch", "torch", _write, _read_back, _usage)
