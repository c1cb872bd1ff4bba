"""Translation between published layouts: key lists and counts, round trips, and what a set of tensors is."""

import math
from dataclasses import replace

import pytest
import torch

from distill.weights.identity import identify
from distill.weights.layouts import Layout, names, rope_periods, shapes
from students.shapes import CATALOG
from tests.support.weights import SMALL, random_weights, translate

# Meta parameters() and keys, timm qkvb parameters: counted on the meta device in the three libraries
PUBLISHED = {
    "vits16": (21_601_152, 188, 21_596_160),
    "vits16plus": (28_697_472, 212, 28_692_480),
    "vitb16": (85_669_632, 188, 85_659_648),
    "vitl16": (303_154_176, 368, 303_128_576),
    "vith16plus": (840_633_600, 552, 840_591_360),
    "vit7b16": (6_716_043_264, 610, 6_716_030_976),
    "convnext_tiny": (27_820_128, 182, 27_820_128),
    "convnext_small": (49_454_688, 344, 49_454_688),
    "convnext_base": (87_566_464, 344, 87_566_464),
    "convnext_large": (196_230_336, 344, 196_230_336),
}


@pytest.mark.parametrize("arch", PUBLISHED)
def test_layouts__parity_of_counts_with_the_published_files(arch: str) -> None:
    spec = CATALOG[arch]
    meta, num_keys, timm = PUBLISHED[arch]
    found = shapes(spec, "meta")
    # the 7B's file also holds the norm of local class tokens, which acts in training only
    extra = {"local_cls_norm.weight": (4096,), "local_cls_norm.bias": (4096,)}
    found |= extra if arch == "vit7b16" else {}
    assert len(found) == num_keys
    buffers = ("bias_mask", "periods")
    copies = ("norms.",)
    parameters = {
        k: v for k, v in found.items() if not k.endswith(buffers) and not k.startswith(copies)
    }
    assert sum(map(math.prod, parameters.values())) == meta
    assert sum(map(math.prod, shapes(spec, "timm").values())) == timm


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("layout", ["meta", "timm"])
def test_origins__there_and_back_is_bit_equal(kind: str, layout: Layout) -> None:
    spec = SMALL[kind]
    weights = random_weights(spec)
    back = translate(translate(weights, spec, "hf", layout), spec, layout, "hf")
    assert list(back) == list(weights)
    lost = {"embeddings.mask_token"} if layout == "timm" else set()  # timm has no mask token
    for name, tensor in weights.items():
        if name in lost and name in back:
            assert not back[name].any()
        else:
            assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("kind", SMALL)
def test_origins__meta_hf_meta_is_bit_equal_but_for_the_masked_key_bias(kind: str) -> None:
    spec = SMALL[kind]
    released = translate(random_weights(spec), spec, "hf", "meta")
    width = spec.width
    for name, tensor in released.items():
        if name.endswith("qkv.bias"):
            tensor[width : 2 * width] = 7.0  # whatever it is, the mask hides it
    back = translate(translate(released, spec, "meta", "hf"), spec, "hf", "meta")
    assert back.keys() == released.keys()
    for name, tensor in released.items():
        if name.endswith("qkv.bias"):
            assert not back[name][width : 2 * width].any()
            tensor[width : 2 * width] = 0.0
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("kind", SMALL)
def test_origins__meta_to_timm_equals_the_way_through_hf(kind: str) -> None:
    spec = SMALL[kind]
    released = translate(random_weights(spec), spec, "hf", "meta")
    direct = translate(released, spec, "meta", "timm")
    around = translate(translate(released, spec, "meta", "hf"), spec, "hf", "timm")
    assert direct.keys() == around.keys()
    assert all(torch.equal(direct[name], tensor) for name, tensor in around.items())


def test_rope_periods__are_those_of_the_network() -> None:
    assert rope_periods(64)[0] == 1.0
    assert rope_periods(64).tolist() == pytest.approx([100 ** (2 * i / 32) for i in range(16)])


@pytest.mark.parametrize("arch", CATALOG)
@pytest.mark.parametrize("layout", ["hf", "meta", "timm"])
@pytest.mark.parametrize("prefix", ["", "teacher.backbone.", "module._orig_mod."])
def test_identify__names_every_network_in_every_layout(
    arch: str, layout: Layout, prefix: str
) -> None:
    found = {prefix + name: shape for name, shape in shapes(CATALOG[arch], layout).items()}
    identity = identify(found)
    # two published sizes of ConvNeXt and the ViTs differ in shapes, so the name is certain
    assert (identity.layout, identity.arch, identity.prefix) == (layout, arch, prefix)
    assert not identity.has_heads


def test_identify__free_sizes_need_their_heads_from_somewhere() -> None:
    spec = SMALL["mlp"]
    with pytest.raises(ValueError, match="attention heads cannot be read from its tensors"):
        identify(shapes(spec, "hf"))
    assert identify(shapes(spec, "hf"), spec).spec == spec
    told = identify(shapes(spec, "meta")).spec  # by the length of its RoPE periods
    assert replace(told, layerscale_init=1e-5) == spec


def test_identify__extras_of_released_files_are_ignored_and_heads_are_seen() -> None:
    spec = CATALOG["vits16"]
    found = {f"teacher.backbone.{k}": v for k, v in shapes(spec, "meta").items()}
    found |= {"teacher.backbone.local_cls_norm.weight": (384,)}
    found |= {f"teacher.{h}.last_layer.weight": (9, 8) for h in ("dino_head", "ibot_head")}
    found |= {"student.backbone.cls_token": (1, 1, 384)}
    identity = identify(found)
    assert identity.has_heads and "local_cls_norm.weight" in identity.ignored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer.3.norm1.weight": None}, r"1 missing \(layer.3.norm1.weight\)"),
        ({"layer.3.extra.weight": (3,)}, r"1 unexpected \(layer.3.extra.weight\)"),
        ({"norm.weight": (5,)}, r"norm.weight: \[5\], expected \[384\]"),
        ({"norm.weight": (5,)}, "looks like a hf file of a network vits16"),
        ({"norm.weight": (10**7,)}, "a side above 65536"),
        ({"embeddings.patch_embeddings.weight": None}, "incomplete: .* is not in it"),
    ],
)
def test_identify__says_what_does_not_fit(
    change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    found = {
        k: v for k, v in {**shapes(CATALOG["vits16"], "hf"), **change}.items() if v is not None
    }
    with pytest.raises(ValueError, match=message):
        identify(found)


def test_identify__refuses_what_is_no_backbone() -> None:
    with pytest.raises(ValueError, match="no backbone in it"):
        identify({"a": (1,)})


def test_names__are_the_state_dict_of_the_network() -> None:
    spec = SMALL["mlp"]
    assert list(names(spec, "hf")) == list(spec.build().state_dict())
