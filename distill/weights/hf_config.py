"""From a shape to the config files of a Hugging Face folder, and back."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from students.foreign import OURS, ForeignError
from students.shapes import BackboneSpec, ConvNeXtSpec, CustomSpec
from teacher.shapes import ViTSpec

LARGEST = 65_536  # of any number in a config; more is no network, and slow to say so
MOST_BLOCKS, MOST_STAGES = 256, 8
CUSTOM_TYPE = "distill_custom"  # no library's; the weights belong to the factory's code
CUSTOM_USE = "It is scored by distill eval, looked at by distill look, and no teacher."
MODEL_TYPES = frozenset({"dinov3_vit", "dinov3_convnext", CUSTOM_TYPE})


def hf_config(spec: BackboneSpec) -> dict[str, Any]:
    """``config.json`` of a Hugging Face folder for this shape; loads in transformers 4.57 and 5.x.

    Everything of the spec but ``untie_local_norm`` is in it: that norm acts in training only and is
    not exported. ``layerscale_value`` is the value this network starts from, where the published
    ViT files say 1.0; loading weights overrides either.
    """
    assert type(spec) in _CONFIGS, f"{type(spec).__name__} needs a row in {__name__}._CONFIGS"
    return _CONFIGS[type(spec)](spec)


def _of_custom(spec: CustomSpec) -> dict[str, Any]:
    return {
        "model_type": CUSTOM_TYPE,
        "factory": spec.factory,
        "args": json.loads(spec.args_json),
        "width": spec.width,
        "stride": spec.stride,
    }


def _shared(spec: BackboneSpec) -> dict[str, Any]:
    return {
        "image_size": 224,
        "num_channels": spec.in_channels,
        "drop_path_rate": 0.0,
        "initializer_range": 0.02,
        "dtype": "float32",
        "transformers_version": "4.57.3",
    }


def _of_convnext(spec: ConvNeXtSpec) -> dict[str, Any]:
    return {
        "architectures": ["DINOv3ConvNextModel"],
        "model_type": "dinov3_convnext",
        "depths": list(spec.depths),
        "hidden_sizes": list(spec.widths),
        "hidden_act": "gelu",
        "layer_norm_eps": spec.norm_eps,
        "layer_scale_init_value": spec.layerscale_init,
        **_shared(spec),
    }


def _of_vit(spec: ViTSpec) -> dict[str, Any]:
    is_gated = spec.ffn == "swiglu"
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "patch_size": spec.patch,
        "hidden_size": spec.width,
        "intermediate_size": spec.ffn_width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "num_register_tokens": spec.registers,
        "use_gated_mlp": is_gated,
        "hidden_act": "silu" if is_gated else "gelu",
        "query_bias": spec.qv_bias,
        "key_bias": spec.key_bias,
        "value_bias": spec.qv_bias,
        "proj_bias": True,
        "mlp_bias": True,
        "layer_norm_eps": spec.norm_eps,
        "layerscale_value": spec.layerscale_init,
        "rope_theta": spec.rope_base,
        "attention_dropout": 0.0,
        "pos_embed_shift": None,
        "pos_embed_jitter": None,
        "pos_embed_rescale": 2.0,
        **_shared(spec),
    }


# type of spec -> its config
_CONFIGS: Mapping[type, Callable[[Any], dict[str, Any]]] = {
    ViTSpec: _of_vit,
    ConvNeXtSpec: _of_convnext,
    CustomSpec: _of_custom,
}


def spec_from_hf_config(config: Mapping[str, Any]) -> BackboneSpec:
    """The shape that a ``config.json`` describes; the inverse of ``hf_config``.

    Raises:
        ValueError: the model type is another one, a key is missing, or a value asks for something
            these networks do not do.
    """
    kind = config.get("model_type")
    if kind == "dinov3_convnext":
        _require(config, {"hidden_act": "gelu"})
        return ConvNeXtSpec(
            depths=_read_ints(config, "depths", MOST_BLOCKS),
            widths=_read_ints(config, "hidden_sizes", LARGEST),
            in_channels=_read_int(config, "num_channels"),
            layerscale_init=_read_float(config, "layer_scale_init_value"),
            norm_eps=_read_float(config, "layer_norm_eps"),
        )
    if kind == CUSTOM_TYPE:
        raise ForeignError(
            f"a custom student, made by {_shown(_read(config, 'factory'))}", CUSTOM_USE
        )
    if kind != "dinov3_vit":
        other = " - DINOv2 has learned position embeddings" if "dinov2" in str(kind) else ""
        raise ForeignError(
            f"model_type = {_shown(kind)}: must be dinov3_vit or dinov3_convnext{other}", OURS
        )
    is_gated = _read(config, "use_gated_mlp")
    has_bias = _read(config, "query_bias")
    _require(
        config,
        {
            "value_bias": has_bias,
            "proj_bias": True,
            "mlp_bias": True,
            "hidden_act": "silu" if is_gated else "gelu",
        },
    )
    has_key_bias = _read(config, "key_bias")
    if has_key_bias:
        _require(config, {"query_bias": True})
    return ViTSpec(
        width=_read_int(config, "hidden_size"),
        depth=_read_int(config, "num_hidden_layers", MOST_BLOCKS),
        heads=_read_int(config, "num_attention_heads"),
        ffn_width=_read_int(config, "intermediate_size"),
        patch=_read_int(config, "patch_size"),
        ffn="swiglu" if is_gated else "mlp",
        qv_bias=has_bias,
        registers=_read_int(config, "num_register_tokens"),
        in_channels=_read_int(config, "num_channels"),
        layerscale_init=_read_float(config, "layerscale_value"),
        key_bias=bool(has_key_bias),
        rope_base=_read_base(config),
        norm_eps=_read_float(config, "layer_norm_eps"),
    )


def _read(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise ValueError(f"{key}: missing from config.json; save it with transformers 4.57 or 5.x")
    return config[key]


def _read_float(config: Mapping[str, Any], key: str) -> float:
    value = _read(config, key)
    if not isinstance(value, int | float) or not 0.0 <= value <= 1e6:
        raise ValueError(f"{key} = {_shown(value)}: must be a number from 0 to 1e6")
    return float(value)


def _read_base(config: Mapping[str, Any]) -> float:
    """The RoPE base; some versions of transformers keep it with other RoPE facts."""
    nested = config.get("rope_parameters")
    base = _read_float(nested if isinstance(nested, dict) else config, "rope_theta")
    kind = nested.get("rope_type", "default") if isinstance(nested, dict) else "default"
    if kind != "default" or base < 1.0:
        raise ValueError(f"rope_theta = {base:g} of type {kind}: must be at least 1 and 'default'")
    return base


def _read_ints(config: Mapping[str, Any], key: str, most: int) -> tuple[int, ...]:
    values = _read(config, key)
    if not isinstance(values, list | tuple) or not 2 <= len(values) <= MOST_STAGES:
        raise ValueError(f"{key} = {_shown(values)}: must be 2 to {MOST_STAGES} integers")
    return tuple(_read_int({key: value}, key, most) for value in values)


def _shown(value: object) -> str:
    """A value from a file, as much of it as a line has room for."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes out
        return "a very large number"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _read_int(config: Mapping[str, Any], key: str, most: int = LARGEST) -> int:
    value = _read(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{key} = {_shown(value)}: must be one integer, at most {most}")
    return value


def _require(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        if _read(config, key) != value:
            raise ValueError(f"{key} = {config[key]!r}: must be {value!r} for this network")


def preprocessor_config(size: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """``preprocessor_config.json``: rescale, resize with antialias, normalise.

    transformers 4.57 and 5.x both read it; the former does not know the newer processor's name.
    """
    return {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
