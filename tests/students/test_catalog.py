from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distill.recipe.types import ARCHITECTURES
from students.catalog import (
    build_backbone,
    hf_config,
    init_weights_,
    preprocessor_config,
    spec_from_hf_config,
)
from students.convnext import ConvNeXt
from students.shapes import CATALOG, BackboneSpec, ConvNeXtSpec
from teacher.shapes import ViTSpec
from teacher.vit import ViT

PUBLISHED = {  # parameters and tensors of the published files
    "vits16": (21_596_544, 211),
    "vits16plus": (28_692_864, 235),
    "vitb16": (85_660_416, 211),
    "vitl16": (303_129_600, 415),
    "vith16plus": (840_592_640, 615),
    "vit7b16": (6_716_035_072, 687),
    "convnext_tiny": (27_820_128, 180),
    "convnext_small": (49_454_688, 342),
    "convnext_base": (87_566_464, 342),
    "convnext_large": (196_230_336, 342),
}
FREE = ViTSpec(48, 2, 3, 100, 8, "swiglu", False, 2, 4, layerscale_init=0.5)
FREE_CONVNEXT = ConvNeXtSpec((1, 2, 1), (8, 16, 24), 4, 0.5)
SAMPLES = {**CATALOG, "free": FREE, "free_convnext": FREE_CONVNEXT}


def on_meta(spec: BackboneSpec) -> nn.Module:
    with torch.device("meta"):
        return build_backbone(spec)


@pytest.mark.parametrize("name", CATALOG)
def test_catalog__counts_are_the_published_ones(name: str) -> None:
    num_tensors = len(on_meta(CATALOG[name]).state_dict())
    assert (CATALOG[name].parameters, num_tensors) == PUBLISHED[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_catalog__parity_of_names_and_shapes(name: str) -> None:
    from transformers import AutoConfig, AutoModel

    config = hf_config(SAMPLES[name])
    with torch.device("meta"):
        theirs = AutoModel.from_config(AutoConfig.for_model(**config))  # type: ignore[no-untyped-call, unused-ignore]
    shapes = {n.removeprefix("model."): p.shape for n, p in theirs.state_dict().items()}
    ours = on_meta(SAMPLES[name])
    assert {n: p.shape for n, p in ours.state_dict().items()} == shapes
    assert type(theirs).__name__ == config["architectures"][0]


def test_catalog__names_are_the_recipes_names() -> None:
    assert set(ARCHITECTURES) == set(PUBLISHED)


def test_catalog__is_closed() -> None:
    with pytest.raises(TypeError):
        CATALOG["vits16"] = FREE  # type: ignore[index]


@given(
    heads=st.integers(1, 4),
    head_dim=st.sampled_from([4, 8, 64]),
    depth=st.integers(1, 4),
    ffn_width=st.integers(1, 99),
    patch=st.integers(1, 20),
    ffn=st.sampled_from(["mlp", "swiglu"]),
    qv_bias=st.booleans(),
    registers=st.integers(0, 5),
    in_channels=st.integers(1, 5),
    untie_local_norm=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_parameters__of_a_vit_are_those_of_the_network(
    heads: int, head_dim: int, **shape: Any
) -> None:
    spec = ViTSpec(width=heads * head_dim, heads=heads, **shape)
    assert spec.parameters == sum(p.numel() for p in on_meta(spec).parameters())


@given(
    stages=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), min_size=2, max_size=4),
    in_channels=st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_parameters__of_a_convnext_are_those_of_the_network(
    stages: list[tuple[int, int]], in_channels: int
) -> None:
    depths, widths = zip(*stages, strict=True)
    spec = ConvNeXtSpec(depths, widths, in_channels)
    assert spec.parameters == sum(p.numel() for p in on_meta(spec).parameters())


@pytest.mark.parametrize("name", SAMPLES)
def test_spec_from_hf_config__round_trips(name: str) -> None:
    assert spec_from_hf_config(hf_config(SAMPLES[name])) == SAMPLES[name]


def test_hf_config__leaves_out_the_local_norm() -> None:
    assert hf_config(replace(FREE, untie_local_norm=True)) == hf_config(FREE)


def test_hf_config__has_the_portable_fields() -> None:
    vit = hf_config(CATALOG["vit7b16"])
    assert len(vit.keys() - {"transformers_version"}) == 27
    assert vit | {"transformers_version": ""} == {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "patch_size": 16,
        "num_channels": 3,
        "image_size": 224,
        "num_register_tokens": 4,
        "layer_norm_eps": 1e-05,
        "layerscale_value": 1e-05,
        "rope_theta": 100.0,
        "query_bias": False,
        "key_bias": False,
        "value_bias": False,
        "proj_bias": True,
        "mlp_bias": True,
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "initializer_range": 0.02,
        "pos_embed_shift": None,
        "pos_embed_jitter": None,
        "pos_embed_rescale": 2.0,
        "dtype": "float32",
        "transformers_version": "",
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "use_gated_mlp": True,
        "hidden_act": "silu",
    }
    assert hf_config(CATALOG["convnext_base"]) | {"transformers_version": ""} == {
        "architectures": ["DINOv3ConvNextModel"],
        "model_type": "dinov3_convnext",
        "num_channels": 3,
        "image_size": 224,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-06,
        "layer_scale_init_value": 1e-06,
        "drop_path_rate": 0.0,
        "initializer_range": 0.02,
        "dtype": "float32",
        "transformers_version": "",
        "depths": [3, 3, 27, 3],
        "hidden_sizes": [128, 256, 512, 1024],
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vits16", {"model_type": "bert"}, "model_type = 'bert': must be dinov3_vit or dinov3_con"),
        ("vits16", {"key_bias": True}, "key_bias = True: must be False"),
        ("vits16", {"value_bias": False}, "value_bias = False: must be True"),
        ("vits16", {"hidden_act": "silu"}, "hidden_act = 'silu': must be 'gelu'"),
        ("vits16", {"rope_theta": 10.0}, "rope_theta = 10.0: must be 100.0"),
        ("vits16", {"layer_norm_eps": 1e-6}, "layer_norm_eps = 1e-06: must be 1e-05"),
        ("vits16", {"patch_size": [16, 16]}, r"patch_size = \[16, 16\]: must be one integer"),
        ("convnext_tiny", {"hidden_act": "relu"}, "hidden_act = 'relu': must be 'gelu'"),
    ],
)
def test_spec_from_hf_config__refuses_other_networks(
    name: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spec_from_hf_config({**hf_config(CATALOG[name]), **change})


def test_spec_from_hf_config__names_a_missing_key() -> None:
    config = hf_config(CATALOG["vits16"])
    del config["num_register_tokens"]
    with pytest.raises(ValueError, match=r"num_register_tokens: missing from config\.json"):
        spec_from_hf_config(config)
    with pytest.raises(ValueError, match="model_type = None"):
        spec_from_hf_config({})


def test_build_backbone__follows_the_kind_of_spec() -> None:
    assert isinstance(build_backbone(FREE), ViT)
    assert isinstance(build_backbone(FREE_CONVNEXT), ConvNeXt)


def test_init_weights__refuses_strangers() -> None:
    with pytest.raises(ValueError, match="Linear: only ViT, ConvNeXt and adapted networks"):
        init_weights_(nn.Linear(2, 2), torch.Generator())


def test_preprocessor_config__says_size_and_normalisation() -> None:
    assert preprocessor_config(64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) == {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_resize": True,
        "size": {"height": 64, "width": 64},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("num_hidden_layers", 10**7, "num_hidden_layers = 10000000: .* at most 256"),
        ("hidden_size", 10**40, "hidden_size = 1000.*: must be one integer"),
        ("hidden_size", True, "hidden_size = True: must be one integer"),
        ("layerscale_value", "big", "layerscale_value = 'big': must be a number"),
    ],
)
def test_spec_from_hf_config__absurd_values_are_refused_at_once(
    key: str, value: object, told: str
) -> None:
    config = hf_config(CATALOG["vits16"]) | {key: value}
    with pytest.raises(ValueError, match=told):
        spec_from_hf_config(config)


def test_spec_from_hf_config__absurd_stages_are_refused_at_once() -> None:
    config = hf_config(CATALOG["convnext_tiny"]) | {"depths": [1] * 100}
    with pytest.raises(ValueError, match=r"depths = .*: must be 2 to 8 integers"):
        spec_from_hf_config(config)
