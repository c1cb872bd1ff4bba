"""Classifiers on features of a network, as modules that can be written: votes of labelled images, and a linear layer."""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn
from torch.nn.functional import normalize


def count_votes(
    nearest: Float64[Tensor, "test k"], voters: Int64[Tensor, "test k"], num_classes: int
) -> tuple[Float64[Tensor, "test classes"], Float64[Tensor, "test classes"]]:
    """Votes of the nearest images for each class, and the sum of the voters' similarities.

    ``voters``: the labels of the nearest images.
    """
    is_vote = (voters[..., None] == torch.arange(num_classes)).double()
    return is_vote.sum(1), (is_vote * nearest[..., None]).sum(1)


class KnnHead(nn.Module):
    """Votes of the nearest training images, in fp64; ``temperature``: of votes by similarity, None for one vote each."""

    features: Tensor
    labels: Tensor

    def __init__(
        self,
        train: Float[Tensor, "train width"],
        train_labels: Int64[Tensor, " train"],
        num_classes: int,
        k: int,
        temperature: float | None,
    ) -> None:
        super().__init__()
        self.register_buffer("features", train.float().clone())
        self.register_buffer("labels", train_labels.clone())
        self._num_classes, self._k, self._temperature = num_classes, k, temperature

    @property
    def usage(self) -> list[str]:
        """Lines of Python from ``class_feature`` and the tensors ``head`` to ``logits``."""
        vote = (
            f"logits = votes.sum(1) + (votes * nearest[..., None]).sum(1) / {2 * self._k + 1}"
            if self._temperature is None
            else f"logits = (votes * torch.softmax(nearest / {self._temperature}, dim=1)[..., None]).sum(1)"
        )
        return [
            "unit = torch.nn.functional.normalize",
            'known, query = unit(head["features"].double()), unit(class_feature.double())',
            f"nearest, rows = (query @ known.T).topk({self._k}, dim=1)",
            f'votes = torch.nn.functional.one_hot(head["labels"][rows], {self._num_classes}).double()',
            vote,
        ]

    def forward(
        self,
        class_token: Float[Tensor, "images width"],
        patch_tokens: Float[Tensor, "images patches width"],  # noqa: ARG002  # as every head
    ) -> Float[Tensor, "images classes"]:
        known, query = (normalize(each.double(), dim=1) for each in (self.features, class_token))
        nearest, rows = (query @ known.T).topk(self._k, dim=1)
        voters = self.labels[rows]
        if self._temperature is not None:
            weights = torch.softmax(nearest / self._temperature, dim=1)
            return count_votes(weights, voters, self._num_classes)[1]
        votes, support = count_votes(nearest, voters, self._num_classes)
        return votes + support / (2 * self._k + 1)  # below half a vote: decides ties alone


class LinearHead(nn.Module):
    """A layer on the class token and the mean of the patch tokens."""

    weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Float[Tensor, "classes inputs"], bias: Float[Tensor, " classes"]
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", bias.clone())

    @property
    def usage(self) -> list[str]:
        """Lines of Python from both features and the tensors ``head`` to ``logits``."""
        return [
            "query = torch.cat([class_feature, patch_features.mean(1)], dim=1)",
            'logits = query @ head["weight"].T + head["bias"]',
        ]

    def forward(
        self,
        class_token: Float[Tensor, "images width"],
        patch_tokens: Float[Tensor, "images patches width"],
    ) -> Float[Tensor, "images classes"]:
        return torch.cat([class_token, patch_tokens.mean(1)], dim=1) @ self.weight.T + self.bias
