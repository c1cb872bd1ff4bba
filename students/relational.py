"""Relational loss: the patches of a student are to each other as the teacher's are.

It compares similarities, so widths need not agree, and nothing is projected. The teacher's features are those that
travel anyway, so only masked patches are compared: the loss adds no traffic.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from teacher.batch import NUM_GLOBAL, Features, StudentBatch
from teacher.gram import cosines
from teacher.losses import LossTerm

Form = Literal["softmax", "gram"]


def relational_term(form: Form, temperature: float) -> LossTerm:
    """Makes the loss term of one student; ``temperature`` is of ``softmax``."""

    def relational(globals_: Features, _: Features, batch: StudentBatch) -> Float[Tensor, ""]:
        flags = batch.masks.flags.flatten(0, 1)  # [images * 2, patches]
        targets = batch.targets.patch_features
        teacher = targets.new_zeros(flags.numel(), targets.shape[1])
        teacher = teacher.index_copy(0, batch.masks.rows(), targets).unflatten(0, flags.shape)
        student = globals_.patches_on(batch.grid_hw)
        total = relational_sum(student, teacher, flags, form, temperature)
        return total / (NUM_GLOBAL * batch.images_global)

    return relational


def relational_sum(
    student: Float[Tensor, "rows patches width"],
    teacher: Float[Tensor, "rows patches teacher_dim"],
    masks: Bool[Tensor, "rows patches"],
    form: Form,
    temperature: float,
) -> Float[Tensor, ""]:
    """Sums over crops how far the similarities of their masked patches lie apart.

    for each crop, with n masked patches, for each pair of them (i, j), i != j:
        gram:     loss += (cos(student_i, student_j) - cos(teacher_i, teacher_j)) ** 2 / n ** 2
        softmax:  loss += p_ij * log(p_ij / q_ij) / n

    p and q are the softmax over j of the teacher's and the student's cosines divided by ``temperature``.
    A patch is not compared with itself: that is 1 on both sides, and would fill the softmax.
    A crop with one masked patch or none adds nothing. Computed in fp32 (float64 stays). No communication.

    Source: ``gram`` is similarity-preserving distillation (Tung and Mori, ICCV 2019) with the patches of a crop in
    place of a batch; ``softmax`` is SEED (Fang et al., ICLR 2021) with them in place of a queue.
    """
    pairs = masks[:, :, None] & masks[:, None, :]
    pairs = pairs & ~torch.eye(masks.shape[1], dtype=torch.bool, device=masks.device)
    num_masked = masks.sum(dim=1).clamp(min=1)
    ours, theirs = cosines(student), cosines(teacher)
    if form == "gram":
        return ((ours - theirs).square() * pairs).sum(dim=(1, 2)).div(num_masked.square()).sum()
    lowest = torch.finfo(ours.dtype).min  # -inf would make NaN of a row without a pair
    log_q, log_p = (
        F.log_softmax((each / temperature).masked_fill(~pairs, lowest), dim=2)
        for each in (ours, theirs)
    )
    return (log_p.exp() * (log_p - log_q) * pairs).sum(dim=(1, 2)).div(num_masked).sum()
