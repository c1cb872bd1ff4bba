"""What other libraries compute from the same weights, and how near it has to be."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.weights.hf_config import hf_config
from students.convnext import ConvNeXt
from teacher.batch import Features
from teacher.vit import ViT

Network = TypeVar("Network", bound=nn.Module)


# Both sides run in fp32 and add up in another order; the largest difference seen is 2e-6.
PARITY = 1e-5


def shuffled_(network: Network) -> Network:
    """Weights far from their initial values, so that every parameter matters to the output."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            spread = 1.0 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.5
            is_norm = name.endswith(("norm.weight", "norm1.weight", "norm2.weight"))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(float(is_norm) + spread * noise)
    return network


def reference(network: ViT | ConvNeXt, folder: Path) -> nn.Module:
    """The transformers model that reads our folder, with no key missing or left over."""
    from transformers import AutoModel

    (folder / "config.json").write_text(json.dumps(hf_config(network.spec)))
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    loaded, facts = AutoModel.from_pretrained(folder, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not facts[kind], (kind, facts[kind])
    return loaded.eval()


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference as a part of the largest value."""
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_parity(ours: Tensor, theirs: Tensor, what: str) -> None:
    """The largest difference is within PARITY of the largest value."""
    difference = relative_difference(ours, theirs)
    assert difference < PARITY, (what, difference)


def assert_gradient_parity(ours: nn.Module, theirs: nn.Module) -> None:
    """Every parameter has a gradient and both sides agree; the reference nests its names."""
    expected = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    assert set(expected) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        wanted = expected[name]
        assert parameter.grad is not None and wanted is not None, name
        assert wanted.any(), name
        assert_parity(parameter.grad, wanted, name)


def outputs(features: Features) -> Tensor:
    """Class and patch tokens side by side."""
    return torch.cat([features.class_token[:, None], features.patch_tokens], dim=1)


def run_as_sharded(network: nn.Module, pixels: Tensor) -> Features:
    """Output with every weight NaN outside its own module's forward, as under sharding."""
    whole = {p: p.detach().clone() for p in network.parameters()}

    def gather(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data.copy_(whole[parameter])

    def release(module: nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data.fill_(float("nan"))

    for module in network.modules():
        release(module)
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    with torch.no_grad():
        features: Features = network(pixels)
    return features


def cut(spec: Any, **changes: Any) -> Any:
    """A catalogue shape with some fields changed, whichever kind it is."""
    return replace(spec, **changes)
