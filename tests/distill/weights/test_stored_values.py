"""Files of other libraries give what those libraries compute from them, whatever the files say beside the weights."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.errors import CheckpointError
from distill.export.convert import convert
from distill.export.verify import largest_differences, probes
from distill.weights.load import load_backbone
from distill.weights.stored_values import base_of
from students.shapes import BackboneSpec, ConvNeXtSpec
from teacher.shapes import ViTSpec
from tests.support.exports import CONVNEXT, GATED, VIT, write_network
from tests.support.stand_ins import meta_convnext, meta_vit, timm_convnext, timm_vit
from tests.support.weights import translate

NEAR = 1e-5  # what we compute differs from what the writer of a file does by less
LOOSE = replace(GATED, qv_bias=False)
Weights = dict[str, Tensor]


def published(spec: BackboneSpec, folder: Path, layout: Any = "meta") -> Weights:
    weights = load_backbone(write_network(folder / "first", spec))[0].state_dict()
    return {name: t.clone() for name, t in translate(weights, spec, "hf", layout).items()}


def assert_same(path: Path, theirs: Callable[[Tensor], tuple[Tensor, Tensor]]) -> BackboneSpec:
    """Our features of a file are those of ``theirs``."""
    backbone, spec = load_backbone(path)
    with torch.no_grad():
        images = probes(spec.stride, spec.in_channels)
        ours = [(f.class_token, f.patch_tokens) for f in map(backbone, images)]
        differences = largest_differences(ours, [theirs(each) for each in images])
    assert max(differences) < NEAR, differences
    return spec


@pytest.mark.parametrize("spec", [VIT, GATED, LOOSE, CONVNEXT])
@pytest.mark.parametrize("layout", ["meta", "timm"])
def test_load_backbone__metas_and_timms_networks(
    spec: BackboneSpec, layout: str, tmp_path: Path
) -> None:
    weights = published(spec, tmp_path, layout)
    save_file(weights, tmp_path / "model.safetensors")
    heads = {"model_args": {"num_heads": 2, "global_pool": "token"}, "architecture": "vit_x"}
    (tmp_path / "config.json").write_text(
        json.dumps(heads if isinstance(spec, ViTSpec) else {"architecture": "convnext_x"})
    )
    run: Any = {
        (True, "meta"): meta_vit,
        (True, "timm"): timm_vit,
        (False, "meta"): meta_convnext,
        (False, "timm"): timm_convnext,
    }[isinstance(spec, ViTSpec), layout]
    assert_same(tmp_path, lambda pixels: run(weights, spec, pixels))


def test_load_backbone__timms_rope_temperature_is_the_base(tmp_path: Path) -> None:
    weights = published(VIT, tmp_path, "timm")
    save_file(weights, tmp_path / "model.safetensors")
    args: dict[str, Any] = {"num_heads": 2, "rope_temperature": 10_000.0}
    for extra, refused in (
        ({}, ""),
        ({"rope_grid_offset": 0.5}, r"model_args\.rope_grid_offset = 0\.5"),
    ):
        config = {"architecture": "vit_x", "model_args": {**args, **extra}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if refused:
            with pytest.raises(CheckpointError, match=refused):
                load_backbone(tmp_path)
        else:
            assert_same(tmp_path, lambda pixels: timm_vit(weights, VIT, pixels, base=10_000.0))


@pytest.mark.parametrize(
    ("base", "half"),
    [
        (100.0, None),
        (10_000.0, None),
        (37.5, None),
        (1.0, None),
        *((b, torch.bfloat16) for b in (100.0, 1e4)),
    ],
)
def test_load_backbone__meta_with_another_rope_base(
    base: float, half: torch.dtype | None, tmp_path: Path
) -> None:
    weights = published(VIT, tmp_path)
    periods = base ** (torch.arange(4, dtype=torch.float64) / 4)  # heads are 16 wide
    weights["rope_embed.periods"] = periods.float() if half is None else periods.to(half)
    torch.save(weights, tmp_path / "of.pth")
    exact = {**weights, "rope_embed.periods": periods}  # rounded periods are taken as their base
    spec = assert_same(tmp_path / "of.pth", lambda pixels: meta_vit(exact, VIT, pixels))
    assert isinstance(spec, ViTSpec) and spec.rope_base == base
    convert(tmp_path / "of.pth", tmp_path / "hf", layout="hf", dtype=None)
    assert json.loads((tmp_path / "hf/config.json").read_text())["rope_theta"] == base
    assert load_backbone(tmp_path / "hf")[1] == spec
    convert(tmp_path / "hf", tmp_path / "again.pth", layout="meta", dtype=None)
    assert load_backbone(tmp_path / "again.pth")[1] == replace(spec, layerscale_init=1e-5)


@pytest.mark.parametrize(
    ("periods", "told"),
    [
        ([0.5, 1.0, 2.0, 4.0], r"runs from 0.5 to 4, .* the published base 100 ends at 31.6"),
        ([1.0, 2.0, 3.0, 4.0], "runs from 1 to 4, not as powers of one base"),
        ([1.0, 0.0, 0.0, float("nan")], "not as powers of one base"),
    ],
)
def test_load_backbone__meta_with_periods_of_no_base(
    periods: list[float], told: str, tmp_path: Path
) -> None:
    weights = published(VIT, tmp_path)
    weights["rope_embed.periods"] = torch.tensor(periods)
    torch.save(weights, tmp_path / "of.pth")
    with pytest.raises(CheckpointError, match=told):
        load_backbone(tmp_path / "of.pth")


def test_base_of__takes_the_base_with_the_fewest_digits() -> None:
    for base in (100.0, 2.0, 1234.0, 10_000.0):
        exact = base ** (torch.arange(16, dtype=torch.float64) / 16)
        assert base_of(exact.float().double(), "periods") == base
    assert base_of(torch.ones(1, dtype=torch.float64), "periods") == 100.0


def test_load_backbone__config_and_periods_that_differ(tmp_path: Path) -> None:
    weights = published(VIT, tmp_path)
    weights["rope_embed.periods"] = 50.0 ** (torch.arange(4) / 4)
    save_file(weights, tmp_path / "first" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"rope_theta = 100 in its config, .* is of 50"):
        load_backbone(tmp_path / "first")


MASKS: dict[str, list[float] | None] = {  # by thirds, queries, keys and values
    "none": None,
    "published": [1.0, 0.0, 1.0],
    "ones": [1.0, 1.0, 1.0],
    "zeros": [0.0, 0.0, 0.0],
    "half": [0.5, 2.0, 1.0],
}


@pytest.mark.parametrize("mask", MASKS)
def test_load_backbone__meta_multiplies_biases_by_their_mask(mask: str, tmp_path: Path) -> None:
    weights, factors = published(VIT, tmp_path), MASKS[mask]
    for name in [name for name in weights if name.endswith("qkv.bias")]:
        weights[name][32:64] = torch.linspace(-3, 3, 32)
        del weights[f"{name}_mask"]
        if factors is not None:
            weights[f"{name}_mask"] = torch.tensor(factors).repeat_interleave(32)
    torch.save(weights, tmp_path / "of.pth")
    spec = assert_same(tmp_path / "of.pth", lambda pixels: meta_vit(weights, VIT, pixels))
    assert isinstance(spec, ViTSpec)
    assert spec.key_bias == (factors is None or factors[1] != 0)
    convert(tmp_path / "of.pth", tmp_path / "hf", layout="hf", dtype=None)
    assert_same(tmp_path / "hf", lambda pixels: meta_vit(weights, VIT, pixels))
    convert(tmp_path / "hf", tmp_path / "again.pth", layout="meta", dtype=None)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert_same(tmp_path / "again.pth", lambda pixels: meta_vit(again, VIT, pixels))


def test_load_backbone__a_mask_that_was_never_set_is_refused(tmp_path: Path) -> None:
    weights = published(VIT, tmp_path)
    weights["blocks.0.attn.qkv.bias_mask"].fill_(float("nan"))
    torch.save(weights, tmp_path / "of.pth")
    with pytest.raises(CheckpointError, match=r"proj\.bias holds numbers that are not finite"):
        load_backbone(tmp_path / "of.pth")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10_000.0, "key_bias": True, "layer_norm_eps": 1e-2},
        {"num_register_tokens": 0, "query_bias": False, "value_bias": False, "key_bias": False},
        {"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 3},
    ],
)
def test_load_backbone__transformers_with_unusual_settings(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"num_register_tokens": 4, "patch_size": 8, "num_attention_heads": 2, **changes}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    _compare_with_transformers("dinov3_vit", {**sizes, **settings}, tmp_path)


def test_load_backbone__transformers_convnext_with_another_epsilon(tmp_path: Path) -> None:
    settings = {"depths": [1, 2, 1, 1], "hidden_sizes": [8, 8, 16, 16], "layer_norm_eps": 1e-2}
    _compare_with_transformers("dinov3_convnext", settings, tmp_path)


def _compare_with_transformers(kind: str, settings: dict[str, Any], folder: Path) -> None:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(kind, **settings)  # type: ignore[no-untyped-call, unused-ignore]
    model = AutoModel.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = 0.3 * torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise + name.endswith(("norm.weight", "norm1.weight", "norm2.weight")))
    model.save_pretrained(folder / "saved")

    def theirs(pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = model(pixels)
        stride = 8 if kind == "dinov3_vit" else 32
        num_patches = (pixels.shape[2] // stride) * (pixels.shape[3] // stride)
        return found.pooler_output, found.last_hidden_state[:, -num_patches:]

    assert_same(folder / "saved", theirs)
    (folder / "memory").mkdir()  # names as the library has them in memory, blocks one level deeper
    save_file(
        {f"net.{name}": tensor for name, tensor in model.state_dict().items()},
        folder / "memory" / "model.safetensors",
    )
    (folder / "memory/config.json").write_text((folder / "saved/config.json").read_text())
    assert_same(folder / "memory", theirs)
    assert isinstance(load_backbone(folder / "memory")[1], ViTSpec | ConvNeXtSpec)


def test_convert__an_epsilon_that_a_layout_does_not_hold_is_refused(tmp_path: Path) -> None:
    folder = write_network(tmp_path / "of", replace(VIT, norm_eps=1e-6))
    for layout in ("meta", "timm"):
        with pytest.raises(CheckpointError, match="norm epsilon 1e-06"):
            convert(folder, tmp_path / "out", layout=layout, dtype=None)  # type: ignore[arg-type, unused-ignore]
