"""Parity with the reference implementation, and what only ours does: masks, local norm, initialisation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from students.catalog import CATALOG, build_backbone, hf_config
from teacher.vit import ViT, ViTSpec, init_vit_

SMALL = ViTSpec(width=48, depth=2, heads=3, ffn_width=96, patch=8)
GATED = replace(SMALL, ffn="swiglu", qv_bias=False, registers=2, patch=4)


def shuffled_(network: nn.Module) -> nn.Module:
    """Weights far from their initial values, so that every parameter matters to the output."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            spread = 1.0 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.5
            offset = 1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) else 0.0
            parameter.copy_(offset + spread * torch.randn(parameter.shape, generator=generator))
    return network


def reference(network: nn.Module, folder: Path) -> nn.Module:
    """The transformers model that reads our folder, with no key missing or left over."""
    from transformers import AutoModel

    (folder / "config.json").write_text(json.dumps(hf_config(network.spec)))  # type: ignore[arg-type]
    save_file(network.state_dict(), folder / "model.safetensors", {"format": "pt"})
    loaded, facts = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert (
        not facts["missing_keys"] and not facts["unexpected_keys"] and not facts["mismatched_keys"]
    )
    return loaded.eval()


CUT = {
    "small": SMALL,
    "gated": GATED,
    "vits16": replace(CATALOG["vits16"], depth=2),
    "vits16plus": replace(CATALOG["vits16plus"], depth=2),
    "vitb16": replace(CATALOG["vitb16"], depth=1),
}


@pytest.mark.parametrize("name", CUT)
def test_parity__tokens_and_gradients(name: str, tmp_path: Path) -> None:
    ours = shuffled_(build_backbone(CUT[name]))
    assert isinstance(ours, ViT)
    theirs = reference(ours, tmp_path)
    side = ours.stride
    pixels = torch.randn(2, 3, 3 * side, 5 * side)
    features, expected = ours(pixels), theirs(pixels).last_hidden_state
    got = torch.cat([features.class_token[:, None], features.patch_tokens], dim=1)
    prefix = 1 + ours.spec.registers
    wanted = torch.cat([expected[:, :1], expected[:, prefix:]], dim=1)
    assert features.grid_hw == (3, 5)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    registers = ours.norm(ours.tokens(pixels))[:, 1:prefix]
    torch.testing.assert_close(registers, expected[:, 1:prefix], rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(wanted)
    (got * direction).sum().backward()
    (wanted * direction).sum().backward()
    their_grads = [p.grad for n, p in theirs.named_parameters() if p.grad is not None]
    our_grads = [p.grad for p in ours.parameters() if p.grad is not None]
    assert len(our_grads) == len(their_grads)
    for mine, other in zip(sorted_by_size(our_grads), sorted_by_size(their_grads), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def sorted_by_size(grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """An order that does not depend on names, which the reference nests differently in memory."""
    return sorted(grads, key=lambda grad: (tuple(grad.shape), float(grad.double().abs().sum())))


def test_vit__masked_patches_see_only_the_mask_token() -> None:
    vit = shuffled_(ViT(SMALL))
    pixels = torch.randn(1, 3, 16, 16)
    masks = torch.tensor([[True, False, False, True]])
    other = pixels.clone()
    other[:, :, :8, :8] = torch.randn(8, 8)
    assert torch.equal(vit(pixels, masks).patch_tokens, vit(other, masks).patch_tokens)
    assert not torch.equal(vit(pixels).patch_tokens, vit(other).patch_tokens)


def test_vit__local_norm_acts_on_local_crops_only() -> None:
    vit = shuffled_(ViT(replace(SMALL, untie_local_norm=True)))
    pixels = torch.randn(1, 3, 16, 16)
    as_global, as_local = vit(pixels), vit(pixels, is_local=True)
    assert not torch.equal(as_global.class_token, as_local.class_token)
    assert torch.equal(as_global.patch_tokens, as_local.patch_tokens)


def test_vit__rope_scale_changes_patches() -> None:
    vit = shuffled_(ViT(SMALL))
    pixels = torch.randn(1, 3, 16, 16)
    assert not torch.equal(vit(pixels).patch_tokens, vit(pixels, rope_scale=1.5).patch_tokens)


def test_vit__refuses_broken_patches() -> None:
    with pytest.raises(
        ValueError, match="crop of 20 x 16 px: sides must be multiples of the patch, 8"
    ):
        ViT(SMALL)(torch.randn(1, 3, 20, 16))


def test_vit_spec__refuses_heads_without_rope_pairs() -> None:
    with pytest.raises(ValueError, match="width 48 with 5 heads"):
        replace(SMALL, heads=5)


def test_init_vit__is_a_function_of_the_generator() -> None:
    first, second = ViT(CATALOG["vits16"]), ViT(CATALOG["vits16"])
    for vit in (first, second):
        init_vit_(vit, torch.Generator().manual_seed(7))
    for (name, mine), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other), name
    assert abs(first.layer[0].mlp.up_proj.weight.std().item() - 0.02) < 5e-4
    assert first.layer[3].layer_scale1.lambda1[0].item() == pytest.approx(1e-5)
    assert not first.embeddings.mask_token.any() and not first.layer[0].attention.q_proj.bias.any()
