"""BatchNorm of a student: groups against plain BatchNorm, running statistics against their definition."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from students.batch_norm import (
    GROUP_IMAGES,
    GroupedBatchNorm,
    RunningStatistics,
    counting,
    group_norms,
)
from teacher.batch import CROPS_PER_IMAGE


@pytest.fixture(autouse=True)
def two_crops() -> Iterator[None]:
    before = CROPS_PER_IMAGE.set(2)
    yield
    CROPS_PER_IMAGE.reset(before)


ROWS = 2 * GROUP_IMAGES  # of a group


def layers(**options: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4, **options)).double()


def pixels(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, 4, 6, dtype=torch.float64, generator=generator) + 0.5


@pytest.mark.parametrize("rows", [ROWS, 2 * ROWS + 6])
def test_grouped__equals_plain_batch_norm_of_every_group(rows: int) -> None:
    plain = layers()
    grouped = copy.deepcopy(plain)
    group_norms(grouped)
    assert isinstance(grouped[1], GroupedBatchNorm)
    assert grouped.state_dict().keys() == plain.state_dict().keys()
    images = pixels(rows).requires_grad_()
    wanted = torch.cat([plain(part) for part in images.split(ROWS)])
    found = grouped(images)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, (images, *grouped.parameters()), cotangent),
        torch.autograd.grad(wanted, (images, *plain.parameters()), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    grouped.eval().load_state_dict(plain.eval().state_dict())
    torch.testing.assert_close(grouped(images), plain(images), rtol=1e-12, atol=0)


def test_running_statistics__are_the_mean_over_groups_of_counted_passes() -> None:
    network = layers()
    group_norms(network)
    statistics, images = RunningStatistics(network), pixels(2 * ROWS)
    assert statistics
    features = network[0](images).detach().unflatten(0, (2, ROWS))
    mean = features.mean(dim=(1, 3, 4)).mean(0)
    variance = torch.stack([each.var(dim=(0, 2, 3)) for each in features]).mean(0)
    with counting(is_counted=True):
        network(images[:ROWS])
        network(images[ROWS:])  # another micro-batch
        with torch.no_grad():
            network(images[:ROWS])
    with counting(is_counted=False):
        network(3.0 * images)  # local crops
    statistics.update(None, 0.9)
    first = statistics.averaged()
    torch.testing.assert_close(first["1.running_mean"].double(), mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(first["1.running_var"].double(), variance, rtol=1e-6, atol=1e-7)
    with counting(is_counted=True):
        network(images + 1.0)
    moved = network[0](images + 1.0).detach().mean(dim=(0, 2, 3))
    saved = statistics.state()
    statistics.update(None, 0.9)
    running = mean + 0.1 * (moved - mean)
    ema = mean + 0.1 * (running - mean)
    second = statistics.averaged()
    torch.testing.assert_close(second["1.running_mean"].double(), ema, rtol=1e-6, atol=1e-7)
    assert second["1.num_batches_tracked"] == 2
    assert {
        f"ema/{name}" for name in first
    } < saved.keys()  # where the weights' EMA is read, they are
    statistics.load_state(saved)
    assert all(torch.equal(value, first[name]) for name, value in statistics.averaged().items())


def test_group_norms__refuses_what_would_normalise_by_the_batch_alone() -> None:
    with pytest.raises(ValueError, match="1: BatchNorm without running statistics"):
        group_norms(layers(track_running_stats=False))


def test_running_statistics__of_a_network_without_batch_norm_are_empty() -> None:
    statistics = RunningStatistics(nn.Linear(2, 2))
    assert not statistics
    assert statistics.state() == statistics.averaged() == {}
