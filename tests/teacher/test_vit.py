"""Parity with the reference implementation, and what only ours does: local norm, initialisation."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from students.shapes import CATALOG
from teacher.shapes import ViTSpec
from teacher.vit import Embeddings, ViT, init_vit_, rope_angles
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

SMALL = ViTSpec(width=48, depth=2, heads=3, ffn_width=96, patch=8)
GATED = replace(SMALL, ffn="swiglu", qv_bias=False, registers=2, patch=4)


CUT: dict[str, Any] = {
    "small": SMALL,
    "gated": GATED,
    "vits16": cut(CATALOG["vits16"], depth=2),
    "vits16plus": cut(CATALOG["vits16plus"], depth=2),
    "vitb16": cut(CATALOG["vitb16"], depth=1),
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("is_masked", [False, True], ids=["unmasked", "masked"])
def test_vit__parity_of_tokens(name: str, is_masked: bool, tmp_path: Path) -> None:
    ours = shuffled_(ViT(CUT[name]))
    theirs = reference(ours, tmp_path)
    pixels = torch.randn(2, 3, 3 * ours.stride, 5 * ours.stride)
    masks = torch.rand(2, 15) < 0.4 if is_masked else None
    with torch.no_grad():
        features, tokens = ours(pixels, masks), ours.tokens(pixels, masks)
        expected = theirs(pixels, bool_masked_pos=masks).last_hidden_state
    num_prefix = 1 + ours.spec.registers
    assert features.grid_hw == (3, 5)
    assert_parity(features.class_token, expected[:, 0], "class")
    assert_parity(tokens[:, 1:num_prefix], expected[:, 1:num_prefix], "registers")
    assert_parity(features.patch_tokens, expected[:, num_prefix:], "patches")
    assert torch.equal(tokens[:, 0], features.class_token)
    assert torch.equal(tokens[:, num_prefix:], features.patch_tokens)


@pytest.mark.parametrize("name", CUT)
def test_vit__parity_of_gradients(name: str, tmp_path: Path) -> None:
    ours = shuffled_(ViT(CUT[name]))
    theirs = reference(ours, tmp_path)
    pixels = torch.randn(2, 3, 3 * ours.stride, 5 * ours.stride)
    masks = torch.rand(2, 15) < 0.4
    tokens = ours.tokens(pixels, masks)
    direction = torch.randn_like(tokens)
    (tokens * direction).sum().backward()
    (theirs(pixels, bool_masked_pos=masks).last_hidden_state * direction).sum().backward()
    assert_gradient_parity(ours, theirs)


def test_vit__masked_patches_see_only_the_mask_token() -> None:
    vit = shuffled_(ViT(SMALL))
    pixels = torch.randn(1, 3, 16, 16)
    masks = torch.tensor([[True, False, False, True]])
    other = pixels.clone()
    other[:, :, :8, :8] = torch.randn(8, 8)
    assert torch.equal(vit(pixels, masks).patch_tokens, vit(other, masks).patch_tokens)
    assert not torch.equal(vit(pixels).patch_tokens, vit(other).patch_tokens)


def test_embeddings__put_the_mask_token_where_the_mask_is() -> None:
    embeddings = shuffled_(Embeddings(SMALL))
    pixels, masks = torch.randn(2, 3, 16, 24), torch.rand(2, 6) < 0.5
    plain, masked = embeddings(pixels, None)[:, 5:], embeddings(pixels, masks)[:, 5:]
    assert torch.equal(masked[~masks], plain[~masks])
    assert torch.equal(masked[masks], embeddings.mask_token[0].expand(int(masks.sum()), -1))


def test_vit__local_norm_acts_on_local_class_tokens_only() -> None:
    vit = shuffled_(ViT(replace(SMALL, untie_local_norm=True)))
    pixels = torch.randn(1, 3, 16, 16)
    as_global, as_local = vit(pixels), vit(pixels, is_local=True)
    assert not torch.equal(as_global.class_token, as_local.class_token)
    assert torch.equal(as_global.patch_tokens, as_local.patch_tokens)
    outputs(as_global).sum().backward()
    assert vit.local_cls_norm.weight.grad is None
    as_local.class_token.sum().backward()
    gradient = vit.local_cls_norm.weight.grad
    assert gradient is not None and gradient.any()
    tied = shuffled_(ViT(SMALL))
    assert torch.equal(tied(pixels).class_token, tied(pixels, is_local=True).class_token)


def test_vit__rope_scale_changes_patches() -> None:
    vit = shuffled_(ViT(SMALL))
    pixels = torch.randn(1, 3, 16, 16)
    assert not torch.equal(vit(pixels).patch_tokens, vit(pixels, rope_scale=1.5).patch_tokens)


def test_vit__every_block_may_have_its_own_rope_scale() -> None:
    vit = shuffled_(ViT(SMALL)).double()
    pixels = torch.randn(1, 3, 16, 24, dtype=torch.float64)
    scales = (0.7, 1.6)
    assert len(vit.layer) == len(scales)
    tokens = vit.embeddings(pixels, None)
    grid_hw = 16 // SMALL.patch, 24 // SMALL.patch
    for block, scale in zip(vit.layer, scales, strict=True):
        angles = rope_angles(grid_hw, SMALL.width // SMALL.heads, scale, pixels.device)
        tokens = block(tokens, angles)
    wanted = vit.norm(tokens)[:, 1 + SMALL.registers :]
    # a deeper network of the same job has more
    assert torch.equal(vit(pixels, rope_scale=(*scales, 9.0)).patch_tokens, wanted)
    same = vit(pixels, rope_scale=(0.7, 0.7))
    assert torch.equal(same.patch_tokens, vit(pixels, rope_scale=0.7).patch_tokens)
    vit.checkpoint_activations()
    assert torch.equal(vit(pixels, rope_scale=scales).patch_tokens, wanted)


def test_vit__bf16_weights_stay_close_to_fp32() -> None:
    vit = shuffled_(ViT(GATED)).bfloat16()
    pixels = torch.randn(2, 3, 16, 12).bfloat16()
    masks = torch.rand(2, 12) < 0.5
    got = outputs(vit(pixels, masks))
    wanted = outputs(vit.float()(pixels.float(), masks))
    assert got.dtype == torch.bfloat16
    # bf16 keeps 8 bits (0.4%); two blocks add up a handful of roundings
    assert relative_difference(got, wanted) < 0.03


def test_vit__uses_weights_only_in_the_module_that_owns_them() -> None:
    vit = shuffled_(ViT(SMALL))
    pixels = torch.randn(1, 3, 16, 24)
    with torch.no_grad():
        whole = outputs(vit(pixels))
    assert torch.equal(outputs(run_as_sharded(vit, pixels)), whole)


CHANGES: dict[str, Any] = {
    "width": 60,
    "depth": 3,
    "heads": 4,
    "ffn_width": 100,
    "patch": 4,
    "ffn": "swiglu",
    "qv_bias": False,
    "registers": 3,
    "in_channels": 4,
    "untie_local_norm": True,
    "layerscale_init": 0.5,
    "key_bias": True,
    "rope_base": 10_000.0,
    "norm_eps": 1e-3,
}


@pytest.mark.parametrize("field", [field.name for field in fields(ViTSpec)])
def test_vit_spec__every_field_changes_the_network(field: str) -> None:
    def fingerprint(spec: ViTSpec) -> list[Any]:
        vit = ViT(spec)
        init_vit_(vit, torch.Generator().manual_seed(0))
        shapes = [(name, tuple(tensor.shape)) for name, tensor in vit.state_dict().items()]
        pixels = torch.linspace(-1, 1, spec.in_channels * 256).reshape(1, spec.in_channels, 16, 16)
        features = vit(pixels, is_local=True)
        return [shapes, features.grid_hw, outputs(features).tolist()]

    base = replace(SMALL, layerscale_init=1.0)
    assert fingerprint(base) == fingerprint(replace(base))
    assert fingerprint(base) != fingerprint(replace(base, **{field: CHANGES[field]}))


def test_vit__refuses_broken_patches() -> None:
    vit = ViT(SMALL)
    wanted = "crop of 20 x 16 px: sides must be multiples of the patch, 8"
    with pytest.raises(ValueError, match=wanted):
        vit(torch.randn(1, 3, 20, 16))
    with pytest.raises(ValueError, match=wanted):
        vit.tokens(torch.randn(1, 3, 20, 16))


def test_vit__refuses_masks_of_another_grid() -> None:
    with pytest.raises(
        ValueError, match=r"masks of \[1, 1\]: must be \[rows, patches\] = \[1, 4\]"
    ):
        ViT(SMALL)(torch.randn(1, 3, 16, 16), torch.ones(1, 1, dtype=torch.bool))


def test_vit_spec__refuses_shapes_that_cannot_be_built() -> None:
    with pytest.raises(ValueError, match=r"width 48 with 5 heads: .* multiple of 4"):
        replace(SMALL, heads=5)
    with pytest.raises(ValueError, match=r"width 48 with 8 heads: .* multiple of 4"):
        replace(SMALL, heads=8)
    with pytest.raises(ValueError, match=r"depth=0.*every size must be at least 1"):
        replace(SMALL, depth=0)


def test_init_vit__is_a_function_of_the_generator() -> None:
    first, second, untied = ViT(SMALL), ViT(SMALL), ViT(replace(SMALL, untie_local_norm=True))
    for vit in (first, second, untied):
        shuffled_(vit)
        torch.rand(3)  # the global generator plays no part
        vit.spec.init_(vit, torch.Generator().manual_seed(7))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
        assert torch.equal(tensor, untied.state_dict()[name]), name
    init_vit_(second, torch.Generator().manual_seed(8))
    assert not torch.equal(first.embeddings.cls_token, second.embeddings.cls_token)


def test_init_vit__has_the_published_statistics() -> None:
    vit = cut(CATALOG["vits16"], depth=1, untie_local_norm=True).build()
    shuffled_(vit)
    vit.spec.init_(vit, torch.Generator().manual_seed(7))
    for name, tensor in vit.state_dict().items():
        if name.endswith(("cls_token", "register_tokens")) or tensor.ndim in (2, 4):
            # five standard errors: of the spread 1 / sqrt(2 n), of the mean 1 / sqrt(n)
            slack = 5.0 * 0.02 / tensor.numel() ** 0.5
            assert abs(tensor.std().item() - 0.02) < slack, name
            assert abs(tensor.mean().item()) < slack, name
        else:
            constant = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            constant = 1e-5 if "lambda1" in name else constant
            assert (tensor == constant).all(), name
