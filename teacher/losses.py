"""The terms of the objective, each equal to its nested-loop definition and independent of how rows are split over ranks.

DINO and iBOT are cross-entropies to assignments (``teacher.heads``). Each term is a sum over this rank's images divided by a count of the
*global* batch, so that adding up ranks is exact when they hold different numbers of images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from teacher.batch import NUM_GLOBAL, Features, StudentBatch
from teacher.peers import waiting_for_peers

KOLEO_EPS = 1e-8  # fp32; keeps the logarithm finite for duplicate images


@dataclass(frozen=True)
class Objective:
    """Weight of each term; zero leaves the term out. ``local`` scales the part of local crops.

    ``cosine`` and ``smooth_l1`` belong to teachers without heads (``students.objective``).
    """

    dino: float
    ibot: float
    koleo: float
    local: float
    gram: float = 0.0
    cosine: float = 0.0
    smooth_l1: float = 0.0


LossTerm = Callable[[Features, Features, StudentBatch], Tensor]
"""A loss term that is added to the objective: features of global crops [2 * images, image-major] and of local crops, and the batch, to a scalar.

It is a sum over this rank's images divided by ``batch.images_global``, differentiable and without communication.
"""


@dataclass(frozen=True)
class ExtraTerm:
    """A loss term that is added to the objective, its weight, and its name in metrics."""

    key: str
    weight: float
    term: LossTerm


@dataclass(frozen=True)
class Losses:
    """The loss to differentiate and its parts, detached; the mean over the group's ranks is the global value."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]


def koleo_loss(
    globals_: Features, batch: StudentBatch, group_size: int, group: dist.ProcessGroup | None
) -> Float[Tensor, ""]:
    """Sums KoLeo over both global crops, divided by the images of the global batch. Arguments and communication as of ``koleo_sum``."""
    num_images = batch.crops.global_crops.shape[0]
    tokens = globals_.class_token.unflatten(0, (num_images, NUM_GLOBAL))
    total = sum(
        koleo_sum(tokens[:, crop], group_size, batch.start, batch.images_global, group)
        for crop in range(NUM_GLOBAL)
    )
    return torch.as_tensor(total) / batch.images_global


@dataclass(frozen=True)
class KoleoGradient:
    """KoLeo of a slice, computed before its micro-batches cut the groups: value, and gradient by the class tokens of the global crops."""

    value: Float[Tensor, ""]
    by_token: Float[Tensor, "images 2 width"]

    def part(self, images: slice) -> "KoleoGradient":
        """Of some images; the first of them carry the value, so that parts add up to it."""
        value = torch.zeros_like(self.value) if images.start else self.value
        return KoleoGradient(value, self.by_token[images])

    def loss(self, globals_: Features) -> Float[Tensor, ""]:
        """Returns a term with this value and this gradient. No communication."""
        linear = (globals_.class_token * self.by_token.flatten(0, 1)).sum()
        return self.value + (linear - linear.detach())


def koleo_gradient(
    class_token: Float[Tensor, "rows width"],
    batch: StudentBatch,
    group_size: int,
    group: dist.ProcessGroup | None,
) -> KoleoGradient:
    """Differentiates ``koleo_loss`` by its tokens [2 * images, image-major]. Communication as ``koleo_sum``."""
    tokens = class_token.detach().requires_grad_()
    loss = koleo_loss(Features(tokens, tokens[:, None], (1, 1)), batch, group_size, group)
    loss.backward()
    assert tokens.grad is not None
    return KoleoGradient(loss.detach(), tokens.grad.unflatten(0, (-1, NUM_GLOBAL)))


def koleo_sum(
    class_tokens: Float[Tensor, "images width"],
    group_size: int,
    start: int,
    images_global: int,
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Sum over this rank's images of minus the log distance to the nearest other image of its KoLeo group.

    The global batch is cut into KoLeo groups of ``group_size`` consecutive positions (the last may
    be smaller; a lone image adds nothing, and so does a micro-batch without images). ``start`` is the position of the first row here. The
    nearest neighbour is chosen without gradient; the distance has gradients on both sides.

    fp32 (float64 stays). Communication: none when no KoLeo group is cut by a rank border (pass
    ``group=None``); otherwise one all-gather forward and one all-reduce backward over ``group``,
    which every rank of it must call.

    Source: DINOv2, section 4 (KoLeo); DINOv3 report, section 3.1 (groups of 16).
    """
    features = class_tokens if class_tokens.dtype == torch.float64 else class_tokens.float()
    features = F.normalize(features, dim=-1, eps=KOLEO_EPS)
    everyone, first = features, start
    if group is not None:
        everyone = _GatherRows.apply(features, start, images_global, group)  # type: ignore[no-untyped-call]
        first = 0
    if not len(everyone):
        return everyone.sum()  # argmax needs a column
    local = torch.arange(start, start + features.shape[0], device=features.device)
    others = torch.arange(first, first + everyone.shape[0], device=features.device)
    comparable = (local // group_size)[:, None] == (others // group_size)[None]
    comparable &= local[:, None] != others[None]
    with torch.no_grad():
        similarity = (features @ everyone.T).masked_fill(~comparable, -torch.inf)
        nearest = similarity.argmax(dim=1)
        has_neighbour = comparable.any(dim=1)
    distance = torch.linalg.vector_norm(features - everyone[nearest] + KOLEO_EPS, dim=1)
    return -((distance + KOLEO_EPS).log() * has_neighbour).sum()


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks of a group, placed at their positions in the global batch; gradients are summed back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, start: int, images_global: int, group: dist.ProcessGroup
    ) -> Tensor:
        ctx.start, ctx.num_rows, ctx.group = start, rows.shape[0], group
        everyone = rows.new_zeros(images_global, rows.shape[1])
        everyone[start : start + rows.shape[0]] = rows
        with waiting_for_peers(rows.device):
            dist.all_reduce(everyone, group=group)  # slices are disjoint: a sum with zeros is exact
        return everyone

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].clone()
        with waiting_for_peers(grad.device):
            dist.all_reduce(grad, group=ctx.group)
        return grad[ctx.start : ctx.start + ctx.num_rows], None, None, None


def extra_parts(
    extra: Sequence[ExtraTerm], globals_: Features, locals_: Features, batch: StudentBatch
) -> dict[str, Tensor]:
    """Computes the added terms, fp32, by the names that metrics have."""
    return {each.key: each.term(globals_, locals_, batch).float() for each in extra}


def weigh(
    parts: dict[str, Tensor],
    objective: Objective,
    extra: Sequence[ExtraTerm],
    group_ranks: int,
) -> Losses:
    """Adds up the terms by their weights, each scaled so that the group's mean is the global value."""
    weights = {**vars(objective), **{each.key: each.weight for each in extra}}
    parts = {name: part * group_ranks for name, part in parts.items()}
    total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
    return Losses(total, {name: part.detach() for name, part in parts.items()})
