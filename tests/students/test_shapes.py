"""Shapes of the catalogue and of free sizes: what they cost and the networks they build."""

import ast
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distill.recipe.types import ARCHITECTURES
from students.convnext import ConvNeXt
from students.shapes import CATALOG, BackboneSpec, ConvNeXtSpec, CustomSpec
from teacher.shapes import ViTSpec
from teacher.vit import ViT
from tests.support.memory import uninitialized_memory_is_nan

ROOT = Path(__file__).parents[2]
PACKAGES = ("distill", "students", "teacher")
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


def on_meta(spec: BackboneSpec) -> nn.Module:
    with torch.device("meta"):
        return spec.build()


@pytest.mark.parametrize("name", CATALOG)
def test_catalog__counts_are_the_published_ones(name: str) -> None:
    num_tensors = len(on_meta(CATALOG[name]).state_dict())
    assert (CATALOG[name].parameters, num_tensors) == PUBLISHED[name]


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


def test_build__gives_the_network_of_the_spec() -> None:
    assert isinstance(FREE.build(), ViT)
    assert isinstance(FREE_CONVNEXT.build(), ConvNeXt)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (FREE, "a ViT"),
        (FREE_CONVNEXT, "a ConvNeXt"),
        (CustomSpec("a:b", "{}", 4, 8, 16), "a custom network"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_init__refuses_another_kind_of_network(spec: BackboneSpec, kind: str) -> None:
    with pytest.raises(ValueError, match=f"Linear: this spec initialises {kind}"):
        spec.init_(nn.Linear(2, 2), torch.Generator())


def test_activation_bytes__of_a_custom_network_are_a_guess() -> None:
    assert CustomSpec("a:b", "{}", 4, 8, 16).activation_bytes(32) == 32 * 32 * 4


def test_specs__plan_without_torch() -> None:
    code = """
import sys
from students.shapes import CATALOG
for spec in CATALOG.values():
    assert spec.flops(224) > spec.first_layer_flops(224) > 0 and spec.activation_bytes(224) > 0
    assert spec.exported == spec and spec.equal_blocks >= 1 and spec.stride and spec.parameters
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_specs__are_asked_and_not_told_apart() -> None:
    kinds = {"ViTSpec", "ConvNeXtSpec", "CustomSpec", "BackboneSpec"}
    found = []
    for path in (each for folder in PACKAGES for each in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "isinstance",
                "issubclass",
            ):
                names = {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}
                names |= {e.attr for e in ast.walk(node.args[1]) if isinstance(e, ast.Attribute)}
                found += [f"{path.relative_to(ROOT)}:{node.lineno}"] if names & kinds else []
    assert len(found) <= 6, found


@pytest.mark.parametrize("spec", [FREE, FREE_CONVNEXT, replace(FREE, untie_local_norm=True)])
def test_init__leaves_no_number_as_it_lay_in_memory(spec: BackboneSpec) -> None:
    """Memory is NaN before: a weight that is missed is loud."""
    network = on_meta(spec)
    with uninitialized_memory_is_nan():
        network.to_empty(device="cpu")
    assert all(tensor.isnan().all() for tensor in network.state_dict().values())
    spec.init_(network, torch.Generator().manual_seed(0))
    assert all(tensor.isfinite().all() for tensor in (*network.parameters(), *network.buffers()))
