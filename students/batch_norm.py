"""BatchNorm in a student, so that a step does not depend on who computes it.

In training a layer normalises groups of 16 consecutive images (all their crops of one kind) by the mean and
variance of the group, as ghost batch norm does. Slices and micro-batches are cut between such groups, so the result is the same
on any number of ranks and in any number of micro-batches, and nothing is sent in the forward pass.

Running statistics are those of global crops, the mean over the groups of a step; an EMA of them goes with the EMA of
the weights. They are held in float64 outside the network, which may be in bf16.

Source: Hoffer et al. 2017, "Train longer, generalize better", section 4 (ghost batch normalization).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from teacher.batch import CROPS_PER_IMAGE
from teacher.peers import waiting_for_peers
from teacher.shapes import KOLEO_GROUP

GROUP_IMAGES = KOLEO_GROUP  # between these every slice and micro-batch is cut
NUM_TRACKED = "num_batches_tracked"
PLAIN = (_BatchNorm.forward, nn.SyncBatchNorm.forward)  # what a group's statistics stand for
NORM_DROP_ACT = ("timm.layers.norm_act", "BatchNormAct2d")  # normalises, drops and activates
_COUNTS: ContextVar[bool] = ContextVar("counts", default=False)


@contextmanager
def counting(*, is_counted: bool) -> Iterator[None]:
    """While inside, forward passes with gradients enter the running statistics, or do not."""
    token = _COUNTS.set(is_counted)
    try:
        yield
    finally:
        _COUNTS.reset(token)


class GroupedBatchNorm(_BatchNorm):
    """A BatchNorm layer that normalises groups of images by themselves while it is trained, and as any other in eval mode."""

    def __init__(self, plain: _BatchNorm) -> None:
        """Takes over parameters and buffers of ``plain``."""
        super().__init__(plain.num_features, plain.eps, plain.momentum, plain.affine)
        self.weight, self.bias = plain.weight, plain.bias
        self.running_mean, self.running_var = plain.running_mean, plain.running_var
        self.num_batches_tracked = plain.num_batches_tracked
        self._sums: Tensor | None = None

    def forward(
        self, x: Float[Tensor, "rows channels *size"]
    ) -> Float[Tensor, "rows channels *size"]:
        """Normalises; the rows are ``teacher.batch.CROPS_PER_IMAGE`` crops of consecutive images. No communication."""
        if not self.training:
            return super().forward(x)
        rows = GROUP_IMAGES * CROPS_PER_IMAGE.get()
        num_full = len(x) // rows
        parts = [x[: num_full * rows].unflatten(0, (num_full, rows))] if num_full else []
        if len(x) % rows:
            parts.append(x[num_full * rows :][None])
        done = [self._normalise(part) for part in parts]
        return torch.cat(done) if done else x

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions."""

    def _normalise(self, groups: Tensor) -> Tensor:
        """Every group by its statistics: as if the channels of each group were separate."""
        num_groups, rows, channels = groups.shape[:3]
        wide = groups.transpose(0, 1).flatten(1, 2)  # [rows, groups * channels, *size]
        wide = wide if wide.dtype == torch.float64 else wide.float()
        moments = wide.new_zeros(2, num_groups * channels)
        weight, bias = (
            None if each is None else each.to(wide.dtype).repeat(num_groups)
            for each in (self.weight, self.bias)
        )
        normal = F.batch_norm(wide, moments[0], moments[1], weight, bias, True, 1.0, self.eps)
        if _COUNTS.get() and torch.is_grad_enabled():
            sums = rows * moments.view(2, num_groups, channels).double().sum(1)
            count = sums.new_full((1,), num_groups * rows)
            sums = torch.cat([sums.flatten(), count])
            self._sums = sums if self._sums is None else self._sums + sums
        return (
            normal.unflatten(1, (num_groups, channels))
            .transpose(0, 1)
            .flatten(0, 1)
            .to(groups.dtype)
        )

    def take_sums(self) -> Float[Tensor, " sums"]:
        """Returns sums of means and of variances per channel, and their weight, since the last call; zeros for none."""
        device = self.running_mean.device  # type: ignore[union-attr]
        none = torch.zeros(2 * self.num_features + 1, dtype=torch.float64, device=device)
        sums, self._sums = self._sums, None
        return none if sums is None else sums


class GroupedBatchNormAct(GroupedBatchNorm):
    """The BatchNorm layer of timm that drops and activates what it normalised."""

    def __init__(self, plain: _BatchNorm) -> None:
        """Takes over ``drop`` and ``act`` of ``plain``, too."""
        super().__init__(plain)
        self.drop, self.act = plain.drop, plain.act

    def forward(
        self, x: Float[Tensor, "rows channels *size"]
    ) -> Float[Tensor, "rows channels *size"]:
        """As ``GroupedBatchNorm``, then dropout, then the activation."""
        return self.act(self.drop(super().forward(x)))  # type: ignore[operator]


def group_norms(network: nn.Module) -> None:
    """Replaces every BatchNorm inside by a ``GroupedBatchNorm`` with the same weights and names.

    Raises:
        ValueError: one has no running statistics, so that it would normalise by whatever is in the batch, or does
            more than BatchNorm, which its replacement would not do.
    """
    for name, child in list(network.named_children()):
        if not isinstance(child, _BatchNorm):
            group_norms(child)
        elif child.running_mean is None:
            raise ValueError(
                f"{name}: BatchNorm without running statistics; leave track_running_stats on"
            )
        elif (type(child).__module__, type(child).__name__) == NORM_DROP_ACT:
            network.add_module(name, GroupedBatchNormAct(child))
        elif _does_more(child):
            raise ValueError(
                f"{name}: {type(child).__name__} does more than BatchNorm, which training would leave out; "
                "use nn.BatchNorm2d, and another module for the rest"
            )
        else:
            network.add_module(name, GroupedBatchNorm(child))


def _does_more(norm: _BatchNorm) -> bool:
    """Whether it has another forward pass, parts (a parametrised weight is one) or hooks."""
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks)
    is_plain = getattr(norm.forward, "__func__", None) in PLAIN
    return not is_plain or any(True for _ in norm.children()) or any(hooks)


class RunningStatistics:
    """Running mean and variance of every BatchNorm of one student, and their EMA; the same on every rank of its group."""

    def __init__(self, network: nn.Module) -> None:
        """``network``: one that ``group_norms`` went through; empty without BatchNorm."""
        modules = network.named_modules()
        self._norms = {name: m for name, m in modules if isinstance(m, GroupedBatchNorm)}
        self._running, self._ema = (
            {name: _moments(norm) for name, norm in self._norms.items()} for _ in range(2)
        )
        steps = [int(norm.num_batches_tracked or 0) for norm in self._norms.values()]
        device = next(network.parameters()).device
        updates = float(max(steps, default=0))
        self._num_updates = torch.tensor(updates, dtype=torch.float64, device=device)

    def __bool__(self) -> bool:
        """Whether there is any BatchNorm."""
        return bool(self._norms)

    @torch.no_grad()
    def update(self, group: dist.ProcessGroup | None, ema_momentum: float) -> None:
        """Goes a step towards the statistics of the forward passes since the last call; the first update is them.

        Communication: one all-reduce of two numbers per channel over ``group``, none when it is None.
        """
        sums = torch.cat([norm.take_sums() for norm in self._norms.values()])
        if group is not None:
            with waiting_for_peers(sums.device):
                dist.all_reduce(sums, group=group)
        is_first = self._num_updates == 0
        self._num_updates += 1
        parts = sums.split([2 * norm.num_features + 1 for norm in self._norms.values()])
        for (name, norm), part in zip(self._norms.items(), parts, strict=True):
            step = 1.0 / self._num_updates if norm.momentum is None else norm.momentum
            moments = (part[:-1] / part[-1]).view(2, -1)
            running, ema = self._running[name], self._ema[name]
            running += torch.where(is_first, 1.0, step) * (moments - running)
            ema += torch.where(is_first, 1.0, 1.0 - ema_momentum) * (running - ema)

    def averaged(self) -> dict[str, Tensor]:
        """Returns the EMA under the names of the network's buffers, fp32 in host memory."""
        named = {name: tensor.cpu() for name, tensor in self._buffers().items()}
        return {k: v.long() if k.endswith(NUM_TRACKED) else v.float() for k, v in named.items()}

    def _buffers(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, ema in self._ema.items():
            tensors |= {f"{name}.running_mean": ema[0], f"{name}.running_var": ema[1]}
            tensors[f"{name}.{NUM_TRACKED}"] = self._num_updates
        return tensors

    def state(self) -> dict[str, Tensor]:
        """Returns everything by name, float64: the EMA as ``ema/BUFFER``, as the weights' EMA is called."""
        running = {f"norms/{name}": each.clone() for name, each in self._running.items()}
        ema = {f"ema/{name}": each.reshape(-1).clone() for name, each in self._buffers().items()}
        return running | ema

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """The reverse of ``state``; other tensors are passed over."""
        for name, running in self._running.items():
            running.copy_(tensors[f"norms/{name}"].view(running.shape))
        for name, part in self._buffers().items():
            part.copy_(tensors[f"ema/{name}"].view(part.shape))


def _moments(norm: GroupedBatchNorm) -> Float[Tensor, "2 channels"]:
    assert norm.running_mean is not None and norm.running_var is not None, "as group_norms checks"
    return torch.stack([norm.running_mean, norm.running_var]).double()
