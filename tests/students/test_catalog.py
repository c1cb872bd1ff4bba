import pytest
import torch
from torch import nn

from distill.recipe import ARCHITECTURES
from students.catalog import (
    CATALOG,
    build_backbone,
    count_parameters,
    hf_config,
    init_weights_,
    preprocessor_config,
    spec_from_hf_config,
)
from teacher.vit import ViTSpec

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


@pytest.mark.parametrize("name", CATALOG)
def test_catalog__counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        network = build_backbone(CATALOG[name])
    assert (count_parameters(CATALOG[name]), len(network.state_dict())) == PUBLISHED[name]


def test_catalog__names_are_the_recipes_names() -> None:
    assert set(CATALOG) == set(ARCHITECTURES) == set(PUBLISHED)


@pytest.mark.parametrize("name", CATALOG)
def test_hf_config__round_trips(name: str) -> None:
    assert spec_from_hf_config(hf_config(CATALOG[name])) == CATALOG[name]


@pytest.mark.parametrize("name", [n for n, s in CATALOG.items() if isinstance(s, ViTSpec)])
def test_parameters__follow_the_closed_form(name: str) -> None:
    spec = CATALOG[name]
    assert isinstance(spec, ViTSpec)
    d, f, p = spec.width, spec.ffn_width, spec.patch
    ffn = 3 * d * f + 2 * f + d if spec.ffn == "swiglu" else 2 * d * f + f + d
    block = 4 * d + 4 * d * d + d + 2 * d * spec.qv_bias + 2 * d + ffn
    assert (
        count_parameters(spec)
        == d + d + spec.registers * d + 3 * p * p * d + d + 2 * d + spec.depth * block
    )


def test_spec_from_hf_config__refuses_other_networks() -> None:
    with pytest.raises(ValueError, match="model_type = 'bert'"):
        spec_from_hf_config({"model_type": "bert"})
    config = hf_config(CATALOG["vits16"])
    with pytest.raises(ValueError, match="key_bias = True: must be False"):
        spec_from_hf_config({**config, "key_bias": True})


def test_init_weights__refuses_strangers() -> None:
    with pytest.raises(ValueError, match="Linear: only ViT and ConvNeXt"):
        init_weights_(nn.Linear(2, 2), torch.Generator())


def test_preprocessor_config__says_size_and_normalisation() -> None:
    config = preprocessor_config(64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert config["size"] == {"height": 64, "width": 64}
    assert (config["image_mean"], config["image_std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
