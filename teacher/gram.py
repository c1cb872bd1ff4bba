"""Gram anchoring: keep how similar patches are to each other, let the features themselves move."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def gram_sum(
    student: Float[Tensor, "rows patches width"],
    anchor: Float[Tensor, "rows anchor_patches anchor_width"],
) -> Float[Tensor, ""]:
    """Sum over crops of the mean squared difference between two patch-similarity matrices.

    for each crop, for each pair of patches (i, j):
        loss += (cos(student_i, student_j) - cos(anchor_i, anchor_j)) ** 2 / patches ** 2

    The widths need not agree. Computed in fp32 (float64 stays). No communication.

    Raises:
        ValueError: the patch counts differ; resize the anchor's map with ``resize_grid`` first.

    Source: DINOv3 report, section 4.2, equation 2.
    """
    if student.shape[1] != anchor.shape[1]:
        raise ValueError(
            f"Gram loss: {student.shape[1]} student patches against {anchor.shape[1]} anchor patches; "
            "resize the anchor's map to the student's grid first"
        )
    student_similarity, anchor_similarity = cosines(student), cosines(anchor)
    return (student_similarity - anchor_similarity).square().mean(dim=(1, 2)).sum()


def cosines(
    patches: Float[Tensor, "rows patches width"],
) -> Float[Tensor, "rows patches patches"]:
    """Computes the cosine of every pair of patches of a crop, in fp32 (float64 stays)."""
    features = patches if patches.dtype == torch.float64 else patches.float()
    features = F.normalize(features, dim=-1)
    return features @ features.transpose(1, 2)
