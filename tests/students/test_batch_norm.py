"""BatchNorm of a student: groups against plain BatchNorm, running statistics against their definition."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from students.batch_norm import (
    GROUP_IMAGES,
    NORM_DROP_ACT,
    GroupedBatchNorm,
    GroupedBatchNormAct,
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


class Activated(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop, self.act = nn.Dropout(0.0), nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return]


def test_group_norms__keeps_the_activation_of_timms_layer() -> None:
    module, name = NORM_DROP_ACT
    of_timm = type(name, (Activated,), {"__module__": module})
    plain = nn.Sequential(nn.Conv2d(3, 4, 2, 2), of_timm(4)).double()
    grouped = copy.deepcopy(plain)
    group_norms(grouped)
    assert isinstance(grouped[1], GroupedBatchNormAct)
    assert grouped.state_dict().keys() == plain.state_dict().keys()
    images = pixels(2 * ROWS)
    wanted = torch.cat([plain(part) for part in images.split(ROWS)])
    torch.testing.assert_close(grouped(images), wanted, rtol=1e-12, atol=1e-12)
    grouped.eval().load_state_dict(plain.eval().state_dict())
    torch.testing.assert_close(grouped(images), plain(images), rtol=1e-12, atol=0)


def with_a_forward_of_its_own() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.forward = lambda x: x.relu()  # type: ignore[method-assign]
    return norm


def with_a_hook() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda *found: found[-1].relu())
    return norm


@pytest.mark.parametrize(
    "make",
    [
        lambda: Activated(4),
        with_a_forward_of_its_own,
        with_a_hook,
        lambda: spectral_norm(nn.BatchNorm2d(4), dim=0),
        lambda: nn.LazyBatchNorm2d(),
    ],
)
def test_group_norms__refuses_what_does_more_than_batch_norm(make: Callable[[], nn.Module]) -> None:
    network = nn.Sequential(nn.Sequential(make()))
    with pytest.raises(ValueError, match="does more than BatchNorm"):
        group_norms(network)


def test_group_norms__takes_a_synchronised_layer_as_a_plain_one() -> None:
    network = nn.Sequential(nn.SyncBatchNorm(4))
    group_norms(network)
    assert type(network[0]) is GroupedBatchNorm


def test_running_statistics__of_a_network_without_batch_norm_are_empty() -> None:
    statistics = RunningStatistics(nn.Linear(2, 2))
    assert not statistics
    assert statistics.state() == statistics.averaged() == {}
