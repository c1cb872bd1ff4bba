"""ConvNeXt as a student: four-by-four stem, depthwise blocks, and a class feature made by pooling.

The class feature is the mean over the last map; it and the patches share the final norm. Parameter
names are the flat names of the published Hugging Face files. Source: Liu et al. 2022; DINOv3
report, section 6 (ConvNeXt students).
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from students.shapes import STEM, ConvNeXtSpec
from teacher.batch import Features, RopeScale
from teacher.init import SMALLEST_FAN_IN, init_matrix_

NARROWEST_PUBLISHED = 96  # channels of the first stage of ConvNeXt-T and -S


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [rows, channels, height, width]."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7 x 7, norm, two pointwise layers with GELU, scale, residual."""

    def __init__(self, width: int, layerscale_init: float, norm_eps: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), layerscale_init))
        self.depthwise_conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.layer_norm = nn.LayerNorm(width, eps=norm_eps)
        self.pointwise_conv1 = nn.Linear(width, 4 * width)
        self.pointwise_conv2 = nn.Linear(4 * width, width)

    def forward(
        self, image: Float[Tensor, "rows channels height width"]
    ) -> Float[Tensor, "rows channels height width"]:
        pixels = self.layer_norm(
            self.depthwise_conv(image).permute(0, 2, 3, 1)
        )  # [rows, height, width, channels]
        pixels = self.gamma * self.pointwise_conv2(F.gelu(self.pointwise_conv1(pixels)))
        return image + pixels.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """A downsampling step and its blocks."""

    def __init__(self, downsample_layers: nn.ModuleList, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.downsample_layers = downsample_layers
        self.layers = blocks

    def forward(self, image: Tensor) -> Tensor:
        for layer in (*self.downsample_layers, *self.layers):
            image = layer(image)
        return image


class ConvNeXt(nn.Module):
    """A ConvNeXt that satisfies ``teacher.batch.Backbone``; it takes no masks."""

    def __init__(self, spec: ConvNeXtSpec) -> None:
        super().__init__()
        self.spec, self.width, self.stride = spec, spec.width, spec.stride
        first, eps = spec.widths[0], spec.norm_eps
        downsamples = [
            nn.ModuleList(
                [nn.Conv2d(spec.in_channels, first, STEM, STEM), ChannelNorm(first, eps=eps)]
            ),
            *(
                nn.ModuleList([ChannelNorm(before, eps=eps), nn.Conv2d(before, after, 2, 2)])
                for before, after in pairwise(spec.widths)
            ),
        ]
        self.stages = nn.ModuleList(
            Stage(
                downsample,
                nn.ModuleList(
                    ConvNeXtBlock(width, spec.layerscale_init, eps) for _ in range(depth)
                ),
            )
            for downsample, width, depth in zip(downsamples, spec.widths, spec.depths, strict=True)
        )
        self.layer_norm = nn.LayerNorm(spec.width, eps=eps)

    def forward(
        self,
        pixels: Float[Tensor, "rows channels height width"],
        masks: Bool[Tensor, "rows patches"] | None = None,
        *,
        rope_scale: RopeScale = 1.0,  # noqa: ARG002  # part of the protocol; there is no RoPE here
        is_local: bool = False,  # noqa: ARG002  # part of the protocol; one norm serves all crops
    ) -> Features:
        """Normalised pooled feature and patch map.

        Raises:
            ValueError: masks are given, or a side is not a multiple of the stride.
        """
        if masks is not None:
            raise ValueError(
                "a ConvNeXt has no mask token: it cannot be pretrained with masked input"
            )
        height, width = pixels.shape[2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"crop of {height} x {width} px: "
                f"sides must be multiples of the stride, {self.stride}"
            )
        image = pixels
        for stage in self.stages:
            image = stage(image)
        patches = image.flatten(2).transpose(1, 2)  # [rows, patches, channels]
        normed = self.layer_norm(torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1))
        return Features(normed[:, 0], normed[:, 1:], (image.shape[2], image.shape[3]))


def init_convnext_(convnext: ConvNeXt, generator: torch.Generator) -> None:
    """Fresh weights: linear and convolution layers truncated normal 0.02, biases zero.

    Networks narrower than ConvNeXt-T take the gain of ``teacher.init``, as small ViTs do. LayerScale
    starts at the spec's initial value.
    """
    smallest_fan_in = 1 if convnext.spec.widths[0] >= NARROWEST_PUBLISHED else SMALLEST_FAN_IN
    for module in convnext.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            init_matrix_(module, generator, smallest_fan_in)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ConvNeXtBlock):
            nn.init.constant_(module.gamma, convnext.spec.layerscale_init)
