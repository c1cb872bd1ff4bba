"""Stochastic depth: what a row gets from the branches it passes through."""

import torch

from teacher.drop_path import active_rows
from teacher.shapes import ViTSpec
from teacher.vit import ViT, init_vit_

SPEC = ViTSpec(width=16, depth=2, heads=2, ffn_width=32, patch=8, layerscale_init=0.5)
CPU = torch.device("cpu")


def network() -> ViT:
    vit = ViT(SPEC)
    init_vit_(vit, torch.Generator().manual_seed(1))
    return vit.double()


def test_kept_rows__indices_of_the_flags_image_major() -> None:
    flags = torch.tensor([[[[1, 0]], [[0, 0]]], [[[1, 1]], [[1, 0]]]], dtype=torch.bool)
    found = active_rows(flags, 0.5, CPU)
    assert [rows.tolist() for rows in found.rows] == [[0, 2, 3], [2]]
    assert found.scale == 2.0


def test_vit__kept_rows_equal_full_branches_with_flags() -> None:
    vit, keep = network(), 0.5
    pixels = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    flags = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(2)) < keep
    found = vit(pixels, active_rows=active_rows(flags, keep, CPU))
    for row in range(6):
        alone = vit(pixels[row : row + 1], active_rows=active_rows(flags[row : row + 1], keep, CPU))
        torch.testing.assert_close(found.class_token[row : row + 1], alone.class_token)
        torch.testing.assert_close(found.patch_tokens[row : row + 1], alone.patch_tokens)
    everything = active_rows(torch.ones(6, 1, 2, 2, dtype=torch.bool), 1.0, CPU)
    torch.testing.assert_close(
        vit(pixels, active_rows=everything).class_token, vit(pixels).class_token
    )


def test_vit__rows_that_skip_everything_keep_their_embedding() -> None:
    vit = network()
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    nothing = active_rows(torch.zeros(3, 1, 2, 2, dtype=torch.bool), 0.5, CPU)
    found = vit(pixels, active_rows=nothing)
    torch.testing.assert_close(found.class_token, vit.norm(vit.embeddings(pixels, None))[:, 0])
    found.class_token.sum().backward()
    gradient = vit.layer[0].mlp.up_proj.weight.grad
    assert gradient is not None and not gradient.any()


def test_vit__checkpointing_changes_no_bit() -> None:
    pixels = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    gradients = []
    for is_checkpointing in (False, True):
        vit = network()
        if is_checkpointing:
            vit.checkpoint_activations()
        vit(pixels).patch_tokens.square().sum().backward()
        gradients.append({name: p.grad for name, p in vit.named_parameters()})
    for name, gradient in gradients[0].items():
        other = gradients[1][name]
        assert (gradient is None) == (other is None)
        assert gradient is None or torch.equal(gradient, other)
