from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from students.convnext import ConvNeXt, init_convnext_
from students.shapes import CATALOG, ConvNeXtSpec
from tests.support.oracles import (
    assert_gradient_parity,
    assert_parity,
    cut,
    outputs,
    reference,
    relative_difference,
    run_as_sharded,
    shuffled_,
)

SMALL = ConvNeXtSpec((1, 2, 1), (8, 16, 24))
CUT: dict[str, Any] = {
    "two_stages": ConvNeXtSpec((2, 1), (8, 12)),
    "three_stages": SMALL,
    "convnext_tiny": cut(CATALOG["convnext_tiny"], depths=(1, 1, 2, 1)),
}


@pytest.mark.parametrize("name", CUT)
def test_convnext__parity_of_features_and_gradients(name: str, tmp_path: Path) -> None:
    ours = shuffled_(ConvNeXt(CUT[name]))
    theirs = reference(ours, tmp_path)
    features = ours(pixels := torch.randn(2, 3, 2 * ours.stride, 3 * ours.stride))
    expected = theirs(pixels).last_hidden_state
    assert features.grid_hw == (2, 3)
    assert_parity(features.class_token, expected[:, 0], "class")
    assert_parity(features.patch_tokens, expected[:, 1:], "patches")
    direction = torch.randn_like(expected)
    (outputs(features) * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_gradient_parity(ours, theirs)


@pytest.mark.parametrize("num_stages", [2, 3, 4, 5])
def test_convnext__stride_halves_the_map_in_each_stage(num_stages: int) -> None:
    spec = ConvNeXtSpec((1,) * num_stages, (4,) * num_stages)
    convnext = shuffled_(ConvNeXt(spec))
    stride = 4 * 2 ** (num_stages - 1)
    assert (spec.stride, convnext.stride, spec.width, convnext.width) == (stride, stride, 4, 4)
    assert convnext(torch.randn(1, 3, stride, 2 * stride)).patch_tokens.shape == (1, 2, 4)


def test_convnext__bf16_weights_stay_close_to_fp32() -> None:
    convnext = shuffled_(ConvNeXt(SMALL)).bfloat16()
    pixels = torch.randn(2, 3, 32, 48).bfloat16()
    got = outputs(convnext(pixels))
    wanted = outputs(convnext.float()(pixels.float()))
    assert got.dtype == torch.bfloat16
    # bf16 keeps 8 bits (0.4%); four blocks add up a handful of roundings
    assert relative_difference(got, wanted) < 0.03


def test_convnext__uses_weights_only_in_the_module_that_owns_them() -> None:
    convnext = shuffled_(ConvNeXt(SMALL))
    pixels = torch.randn(1, 3, 32, 16)
    with torch.no_grad():
        whole = outputs(convnext(pixels))
    assert torch.equal(outputs(run_as_sharded(convnext, pixels)), whole)


def test_convnext__refuses_masks_and_broken_sides() -> None:
    convnext = ConvNeXt(SMALL)
    with pytest.raises(ValueError, match="no mask token"):
        convnext(torch.randn(1, 3, 32, 32), torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="40 x 32 px: sides must be multiples of the stride, 16"):
        convnext(torch.randn(1, 3, 40, 32))


def test_convnext_spec__refuses_shapes_that_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="one of each per stage"):
        ConvNeXtSpec((1, 2), (8, 16, 24))
    with pytest.raises(ValueError, match="two stages at least"):
        ConvNeXtSpec((), ())
    with pytest.raises(ValueError, match=r"depths=\(1, 0\).*every size must be at least 1"):
        ConvNeXtSpec((1, 0), (8, 16))


CHANGES: dict[str, Any] = {
    "depths": (1, 1, 2),
    "widths": (8, 16, 20),
    "in_channels": 4,
    "layerscale_init": 0.5,
    "norm_eps": 1e-3,
}


@pytest.mark.parametrize("field", [field.name for field in fields(ConvNeXtSpec)])
def test_convnext_spec__every_field_changes_the_network(field: str) -> None:
    def fingerprint(spec: ConvNeXtSpec) -> list[Any]:
        convnext = ConvNeXt(spec)
        init_convnext_(convnext, torch.Generator().manual_seed(0))
        shapes = [(name, tuple(tensor.shape)) for name, tensor in convnext.state_dict().items()]
        pixels = torch.linspace(-1, 1, spec.in_channels * 256).reshape(1, spec.in_channels, 16, 16)
        return [shapes, outputs(convnext(pixels)).tolist()]

    base = replace(SMALL, layerscale_init=1.0)
    assert fingerprint(base) == fingerprint(replace(base))
    assert fingerprint(base) != fingerprint(replace(base, **{field: CHANGES[field]}))


def test_init_convnext__is_a_function_of_the_generator() -> None:
    first, second = shuffled_(ConvNeXt(SMALL)), ConvNeXt(SMALL)
    for network in (first, second):
        network.spec.init_(network, torch.Generator().manual_seed(7))
    for (name, mine), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other), name
    init_convnext_(second, torch.Generator().manual_seed(8))
    stem = "stages.0.downsample_layers.0.weight"
    assert not torch.equal(first.state_dict()[stem], second.state_dict()[stem])


def test_init_convnext__narrow_networks_keep_the_gain_of_vit_s() -> None:
    convnext = ConvNeXt(ConvNeXtSpec((1, 1), (48, 96)))
    init_convnext_(convnext, torch.Generator().manual_seed(7))
    weight = convnext.state_dict()["stages.1.layers.0.pointwise_conv1.weight"]  # 96 inputs
    assert weight.std().item() == pytest.approx(2 * 0.02, rel=0.03)


def test_init_convnext__has_the_published_statistics() -> None:
    convnext = shuffled_(ConvNeXt(ConvNeXtSpec((1, 1), (96, 192))))
    init_convnext_(convnext, torch.Generator().manual_seed(7))
    for name, tensor in convnext.state_dict().items():
        if tensor.ndim in (2, 4):
            # five standard errors: of the spread 1 / sqrt(2 n), of the mean 1 / sqrt(n)
            slack = 5.0 * 0.02 / tensor.numel() ** 0.5
            assert abs(tensor.std().item() - 0.02) < slack, name
            assert abs(tensor.mean().item()) < slack, name
        else:
            constant = 1e-6 if name.endswith("gamma") else 0.0
            constant = 1.0 if tensor.ndim == 1 and name.endswith("weight") else constant
            assert (tensor == constant).all(), name
