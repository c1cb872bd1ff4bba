"""Learning from a teacher without heads: the student's tokens, through light projectors, match the teacher's features.

Teacher features differ in scale by orders of magnitude between channels, so each channel is
standardised with running statistics first; without that a handful of channels would be the full
loss. Class features and the features of masked patches are compared, each by cosine and by
smooth L1. A student with a coarser map has it resized to the teacher's grid.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from teacher.batch import NUM_GLOBAL, Features, StudentBatch
from teacher.init import init_matrix_
from teacher.losses import Losses, extra_parts, weigh
from teacher.peers import waiting_for_peers
from teacher.task import StepScalars, TaskOptions, see_crops

MEMORY_STEPS = 100  # updates that the running statistics look back over, once there are as many
VARIANCE_EPS = 1e-6  # a channel that never changes becomes zero instead of infinite


@dataclass(frozen=True)
class StandardFeatures:
    """Teacher features of one slice with zero mean and unit variance per channel, fp32."""

    class_features: Float[Tensor, "images 2 teacher_dim"]
    patch_features: Float[Tensor, "masked patch_teacher_dim"]

    def part(self, images: slice, masked: slice) -> "StandardFeatures":
        """Of some images and their masked patches; views."""
        return StandardFeatures(self.class_features[images], self.patch_features[masked])


class ChannelStatistics:
    """Running mean and mean square of each channel of one kind of token.

    The first updates are averaged evenly, later ones with a memory of ``MEMORY_STEPS``.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.num_updates = torch.zeros((), dtype=torch.float64, device=device)
        self.moments = torch.zeros(2, channels, dtype=torch.float64, device=device)

    @torch.no_grad()
    def standardise(
        self, rows: Float[Tensor, "*rows teacher_dim"], group: dist.ProcessGroup | None
    ) -> Float[Tensor, "*rows teacher_dim"]:
        """Updates the statistics with the rows of the full group, then normalises this rank's; fp32 out.

        Sums are float64. Communication: one all-reduce of [2 * teacher_dim + 1] over ``group``, none when
        it is None; a rank without rows must still call.
        """
        flat = rows.flatten(0, -2).double()
        count = flat.new_full((1,), flat.shape[0])
        sums = torch.cat([flat.sum(0), flat.square().sum(0), count])
        if group is not None:
            with waiting_for_peers(sums.device):
                dist.all_reduce(sums, group=group)
        has_rows = (
            sums[-1] > 0
        )  # stays on the device: a step without masked patches changes nothing
        moments = (sums[:-1] / sums[-1].clamp(min=1.0)).view(2, -1)
        self.num_updates += has_rows
        weight = has_rows / self.num_updates.clamp(1.0, MEMORY_STEPS)
        self.moments += weight * (moments - self.moments)
        mean, mean_square = self.moments
        variance = (mean_square - mean.square()).clamp(min=0.0)
        standard = (flat - mean) * (variance + VARIANCE_EPS).rsqrt()
        return standard.float().view(rows.shape)


class FeatureNormalizer:
    """Makes the targets of the feature objective; its statistics belong to one student's group."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self._kinds = {
            "class": ChannelStatistics(channels, device),
            "patch": ChannelStatistics(channels, device),
        }

    def build_targets(
        self,
        batch: StudentBatch,
        temperature: float,  # noqa: ARG002  # belongs to prototypes
        group: dist.ProcessGroup | None,
    ) -> StandardFeatures:
        """Standardised targets of a slice. Collective over ``group``."""
        return StandardFeatures(
            self._kinds["class"].standardise(batch.targets.class_features, group),
            self._kinds["patch"].standardise(batch.targets.patch_features, group),
        )

    def state(self) -> dict[str, Tensor]:
        """The statistics, by name; the same on every rank of the group."""
        return {
            f"{kind}.{name}": tensor.clone().reshape(-1)
            for kind, statistics in self._kinds.items()
            for name, tensor in vars(statistics).items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of ``state``."""
        for kind, statistics in self._kinds.items():
            for name, tensor in vars(statistics).items():
                tensor.copy_(tensors[f"{kind}.{name}"].view(tensor.shape))


class FeatureTask(nn.Module):
    """Backbone, two linear projectors to the teacher's width, and the feature objective."""

    def __init__(
        self,
        backbone: nn.Module,
        class_projector: nn.Linear,
        patch_projector: nn.Linear,
        options: TaskOptions,
        group_ranks: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.class_projector = class_projector
        self.patch_projector = patch_projector
        self.options = options
        self._group_ranks = group_ranks

    def forward(
        self, batch: StudentBatch, targets: StandardFeatures, scalars: StepScalars
    ) -> Losses:
        """Cosine and smooth L1, each the mean of its class part and its patch part. No communication.

        Class features: each global crop with its target, each local crop with both.
        """
        globals_, locals_ = see_crops(self.backbone, batch, self.options, scalars)
        masked, patch_weights = batch.masked_rows(globals_)
        patch_parts = feature_sums(
            self.patch_projector(masked), targets.patch_features, patch_weights
        )
        predicted, wanted, pair_weights = self._pairs(
            globals_, locals_, targets.class_features, scalars.objective.local, batch.images_global
        )
        class_parts = feature_sums(predicted, wanted, pair_weights)
        parts = {
            name: 0.5 * (of_class + of_patches)
            for name, of_class, of_patches in zip(
                ("cosine", "smooth_l1"), class_parts, patch_parts, strict=True
            )
        }
        extra = self.options.extra
        parts |= extra_parts(extra, globals_, locals_, batch)
        return weigh(parts, scalars.objective, extra, self._group_ranks)

    def _pairs(
        self,
        globals_: Features,
        locals_: Features,
        targets: Float[Tensor, "images 2 teacher_dim"],
        local_weight: float,
        images_global: int,
    ) -> tuple[
        Float[Tensor, "pairs teacher_dim"],
        Float[Tensor, "pairs teacher_dim"],
        Float[Tensor, " pairs"],
    ]:
        num_images = targets.shape[0]
        projected = self.class_projector(globals_.class_token)  # [images * 2, teacher_dim]
        local = self.class_projector(locals_.class_token).view(num_images, -1, projected.shape[1])
        num_locals = local.shape[1]
        shape = (num_images, num_locals, NUM_GLOBAL, projected.shape[1])
        predicted = torch.cat([projected, local[:, :, None].expand(shape).flatten(0, 2)])
        wanted = torch.cat([targets.flatten(0, 1), targets[:, None].expand(shape).flatten(0, 2)])
        weights = torch.cat(
            [
                targets.new_ones(projected.shape[0]),
                targets.new_full((num_images * num_locals * NUM_GLOBAL,), local_weight),
            ]
        )
        return predicted, wanted, weights / (NUM_GLOBAL * (1 + num_locals) * images_global)


def feature_sums(
    predicted: Float[Tensor, "rows teacher_dim"],
    target: Float[Tensor, "rows teacher_dim"],
    weights: Float[Tensor, " rows"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Weighted sums over rows of ``1 - cosine`` and of the channel mean of smooth L1 (beta 1).

    Computed in fp32, or float64 if the target is. No communication.
    """
    projected = predicted.to(target.dtype)
    cosine = 1.0 - F.cosine_similarity(projected, target, dim=1)
    distance = F.smooth_l1_loss(projected, target, reduction="none").mean(dim=1)
    return (weights * cosine).sum(), (weights * distance).sum()


def build_projectors(
    width: int, teacher_dim: int, generator: torch.Generator
) -> tuple[nn.Linear, nn.Linear]:
    """Fresh class and patch projectors, fp32 on the CPU."""
    projectors = nn.Linear(width, teacher_dim), nn.Linear(width, teacher_dim)
    for projector in projectors:
        init_matrix_(projector, generator)
    return projectors
