"""Networks are made where they work: the same numbers on every device, and one tensor at a time in the host's memory."""

import pytest
import torch
from torch import nn

from students.shapes import BackboneSpec, ConvNeXtSpec
from students.student import build_backbone, build_heads, build_network, seeded
from teacher.heads import Head, init_head_
from teacher.shapes import HeadShape, ViTSpec
from tests.support.gpu import CPU_AND_GPU
from tests.support.memory import uninitialized_memory_is_nan
from tests.support.saved_bytes import PeakBytes

VIT = ViTSpec(64, 3, 2, 128, ffn="swiglu", qv_bias=False)
CONVNEXT = ConvNeXtSpec((1, 1, 2, 1), (8, 16, 32, 64))
SHAPES = HeadShape(64, 96, 16, 200), HeadShape(64, 48, 8, 100)


def drawn_in_place(spec: BackboneSpec) -> nn.Module:
    """As networks were made before: on the CPU in fp32, over what torch's layers begin with."""
    network, generator = spec.build(), seeded(3, "network")
    spec.init_(network, generator)
    return network


@pytest.mark.parametrize("spec", [VIT, CONVNEXT], ids=["vit", "convnext"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@CPU_AND_GPU
def test_build_backbone__has_the_same_numbers_everywhere(
    device: str, dtype: torch.dtype, spec: BackboneSpec
) -> None:
    expected = drawn_in_place(spec).to(dtype).state_dict()
    with uninitialized_memory_is_nan():
        made = build_backbone(spec, seeded(3, "network"), torch.device(device), dtype)
    found = made.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.device.type == device and tensor.dtype == dtype
        assert torch.equal(tensor.cpu(), expected[name]), name
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_build_heads__go_on_with_the_generator() -> None:
    generator, expected = seeded(3, "heads"), []
    for shape in SHAPES:
        expected.append(Head(shape))
        init_head_(expected[-1], generator)
    with uninitialized_memory_is_nan():
        made = build_heads(SHAPES, seeded(3, "heads"))
    for head, before in zip(made, expected, strict=True):
        for name, tensor in before.state_dict().items():
            assert torch.equal(head.state_dict()[name], tensor), name


def test_build_network__holds_one_tensor_in_the_host() -> None:
    """The meta device stands for one elsewhere: what is copied there takes no memory here."""
    largest = max(p.numel() for p in [*VIT.build().parameters(), *Head(SHAPES[0]).parameters()])
    with PeakBytes("cpu") as before:
        drawn_in_place(VIT)
    with PeakBytes("cpu") as counted:
        network, *heads = build_network(
            VIT, SHAPES, seeded(3, "network"), torch.device("meta"), torch.bfloat16
        )
    assert all(p.is_meta for each in (network, *heads) for p in each.parameters())
    assert 4 * largest <= counted.peak <= 2 * 4 * largest  # torch's truncated normal has masks
    assert before.peak > 4 * VIT.parameters  # what it was for the backbone alone
