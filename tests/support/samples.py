"""Features and labels of three classes, to score."""

import torch

from distill.protocols.images import Extracted
from distill.protocols.score import Protocol, Sample


def overlapping(num_train: int, protocol: Protocol, shift: float = 0.7, seed: int = 0) -> Sample:
    """Three classes that overlap, 60 held-out images; all features of an image are the same."""
    generator = torch.Generator().manual_seed(seed)
    found, labels = [], []
    for count in (num_train, 60):
        labels.append(torch.arange(count) % 3)
        features = torch.randn(count, 8, generator=generator)
        features[torch.arange(count), labels[-1]] += 3 * shift
        found.append(Extracted(features, features, features))
    return Sample(found[0], labels[0], found[1], labels[1], protocol)
