from dataclasses import replace
from typing import Any

import pytest
import torch

from distill.weights.hf_config import hf_config, preprocessor_config, spec_from_hf_config
from students.shapes import CATALOG, ConvNeXtSpec
from teacher.shapes import ViTSpec

FREE = ViTSpec(48, 2, 3, 100, 8, "swiglu", False, 2, 4, layerscale_init=0.5)
UNUSUAL = replace(FREE, qv_bias=True, key_bias=True, rope_base=1e4, norm_eps=1e-6)
FREE_CONVNEXT = ConvNeXtSpec((1, 2, 1), (8, 16, 24), 4, 0.5)
SAMPLES = {**CATALOG, "free": FREE, "unusual": UNUSUAL, "free_convnext": FREE_CONVNEXT}


@pytest.mark.parametrize("name", SAMPLES)
def test_catalog__parity_of_names_and_shapes(name: str) -> None:
    from transformers import AutoConfig, AutoModel

    config = hf_config(SAMPLES[name])
    with torch.device("meta"):
        ours = SAMPLES[name].build()
        theirs = AutoModel.from_config(AutoConfig.for_model(**config))  # type: ignore[no-untyped-call, unused-ignore]
    shapes = {n.removeprefix("model."): p.shape for n, p in theirs.state_dict().items()}
    assert {n: p.shape for n, p in ours.state_dict().items()} == shapes
    assert type(theirs).__name__ == config["architectures"][0]


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
        (
            "vits16",
            {"model_type": "dinov2"},
            "model_type = 'dinov2': .* learned position embeddings",
        ),
        ("vit7b16", {"key_bias": True}, "query_bias = False: must be True"),
        ("vits16", {"value_bias": False}, "value_bias = False: must be True"),
        ("vits16", {"hidden_act": "silu"}, "hidden_act = 'silu': must be 'gelu'"),
        ("vits16", {"rope_theta": 0.1}, "rope_theta = 0.1 of type default: must be at least 1"),
        ("vits16", {"rope_parameters": {"rope_theta": 9.0, "rope_type": "yarn"}}, "of type yarn"),
        ("vits16", {"layer_norm_eps": "x"}, "layer_norm_eps = 'x': must be a number"),
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
