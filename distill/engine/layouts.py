"""How DeepSpeed divides a network's fp32 values over its ranks, in both of its layouts, and the way back to full tensors.

    stages 1 and 2   all parameters of a group behind one another, cut into equal parts
    stage 3          each parameter cut into equal parts, the last padded; a rank's parts behind one another

Weights, moments and EMA are all divided alike, so one layout serves them all.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from distill.engine.deepspeed_private import (
    OF_FLAT,
    OF_PARAMETER,
    OF_PIECES,
    require_attributes,
)


@runtime_checkable
class Shards(Protocol):
    """This rank's part of every parameter group, fp32; ``weights`` are the master weights, ``computed_with`` what the network computes with here."""

    weights: list[Tensor]
    computed_with: list[Tensor]

    def full(
        self, rank_parts: Sequence[Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """Name and full tensor of every parameter, from the parts of the ranks. Collective over the group."""
        ...

    def rank_parts(self, full: Callable[[str], Tensor]) -> list[Tensor]:
        """This rank's part of full tensors. No communication."""
        ...

    def load(self, full: Callable[[str], Tensor]) -> None:
        """Sets the master weights and what the network computes with. No communication."""
        ...

    def show_weights(self) -> None:
        """The network computes with the master weights as they are now. Collective over the group."""
        ...

    def copy_to(self, rank_parts: Sequence[Tensor], targets: Mapping[str, Tensor]) -> None:
        """Writes values into parameters of the same names, full or sharded. Collective over the group."""
        ...


def shards_of(zero: Any, module: nn.Module, group: dist.ProcessGroup) -> Shards:
    """The layout of a DeepSpeed optimizer."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        require_attributes(zero, OF_PIECES)
        require_attributes(next(module.parameters()), OF_PARAMETER)
        return PieceShards(zero, names, group)
    require_attributes(zero, OF_FLAT)
    return FlatShards(zero, names, group)


class FlatShards:
    """Stages 1 and 2: a parameter's place in the flat buffer of its group is where its storage points."""

    def __init__(self, zero: Any, names: Mapping[int, str], group: dist.ProcessGroup) -> None:
        self._zero, self._names, self._group = zero, names, group
        self.weights: list[Tensor] = list(zero.single_partition_of_fp32_groups)
        self.computed_with: list[Tensor] = list(zero.bit16_groups_flat)

    def full(
        self, rank_parts: Sequence[Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """As the protocol; one all-gather per parameter group."""
        for flat, parameters, shard in zip(
            self.computed_with, self._zero.bit16_groups, rank_parts, strict=True
        ):
            values = gather_equal(shard.detach().to(dtype), self._group)
            for parameter in parameters:
                span = _span_of(parameter, flat)
                yield self._names[id(parameter)], values[span].view(parameter.shape)

    def rank_parts(self, full: Callable[[str], Tensor]) -> list[Tensor]:
        """As the protocol."""
        return [self._part(self._assembled(index, full)) for index in range(len(self.weights))]

    def load(self, full: Callable[[str], Tensor]) -> None:
        """As the protocol."""
        for index, (shard, flat) in enumerate(zip(self.weights, self.computed_with, strict=True)):
            values = self._assembled(index, full)
            shard.copy_(self._part(values))
            flat.copy_(values)

    def show_weights(self) -> None:
        """As the protocol; one all-gather per parameter group."""
        for flat, shard in zip(self.computed_with, self.weights, strict=True):
            flat.copy_(gather_equal(shard.detach(), self._group))

    def copy_to(self, rank_parts: Sequence[Tensor], targets: Mapping[str, Tensor]) -> None:
        """As the protocol; gathers in the targets' dtype."""
        dtype = next(iter(targets.values())).dtype
        for name, value in self.full(rank_parts, dtype):
            targets[name].copy_(value)

    def _part(self, values: Tensor) -> Tensor:
        """This rank's part of a full buffer."""
        return values.chunk(dist.get_world_size(self._group))[dist.get_rank(self._group)]

    def _assembled(self, index: int, full: Callable[[str], Tensor]) -> Tensor:
        flat = self.computed_with[index]
        values = torch.zeros(flat.numel(), dtype=torch.float32, device=flat.device)
        for parameter in self._zero.bit16_groups[index]:
            name = self._names[id(parameter)]
            values[_span_of(parameter, flat)] = full(name).to(values).flatten()
        return values


class PieceShards:
    """Stage 3: equal pieces of each parameter."""

    def __init__(self, zero: Any, names: Mapping[int, str], group: dist.ProcessGroup) -> None:
        self._zero, self._names, self._group = zero, names, group
        self.weights: list[Tensor] = list(zero.fp32_partitioned_groups_flat)
        self.computed_with: list[Tensor] = list(zero.fp16_partitioned_groups_flat)
        rank = dist.get_rank(group)
        for rank_parts in (self.weights, self.computed_with):
            for _, parameter, piece in self._pieces(
                rank_parts
            ):  # padding is whatever lay in memory
                piece[max(0, parameter.ds_numel - rank * piece.numel()) :].zero_()

    def full(
        self, rank_parts: Sequence[Tensor], dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """As the protocol; one all-gather per parameter, so that only one is full at a time."""
        for name, parameter, piece in self._pieces(rank_parts):
            yield name, self._gathered(parameter, piece.to(dtype))

    def rank_parts(self, full: Callable[[str], Tensor]) -> list[Tensor]:
        """As the protocol."""
        rank = dist.get_rank(self._group)
        parts = [torch.zeros_like(shard) for shard in self.weights]
        for name, _, piece in self._pieces(parts):
            size = piece.numel()
            values = full(name).flatten()[rank * size : (rank + 1) * size]
            piece[: len(values)].copy_(values)
        return parts

    def load(self, full: Callable[[str], Tensor]) -> None:
        """As the protocol."""
        for shard, part in zip(self.weights, self.rank_parts(full), strict=True):
            shard.copy_(part)
        self.show_weights()

    def show_weights(self) -> None:
        """As the protocol; without communication."""
        for half, shard in zip(self.computed_with, self.weights, strict=True):
            half.copy_(shard.detach())

    def copy_to(self, rank_parts: Sequence[Tensor], targets: Mapping[str, Tensor]) -> None:
        """As the protocol; what is sharded in the same pieces is copied without communication."""
        for name, parameter, piece in self._pieces(rank_parts):
            target = targets[name]
            if not isinstance(target, DTensor):
                target.copy_(self._gathered(parameter, piece.to(target.dtype)))
                continue
            local = target.to_local()
            if _is_cut_alike(target):
                local.flatten().copy_(piece)
                continue
            full = self._gathered(parameter, piece.to(local.dtype))
            parts = full.chunk(dist.get_world_size(self._group))
            rank = dist.get_rank(self._group)
            if rank < len(parts):
                local.copy_(parts[rank])

    def _pieces(self, rank_parts: Sequence[Tensor]) -> Iterator[tuple[str, Any, Tensor]]:
        for parameters, shard in zip(self._zero.fp16_groups, rank_parts, strict=True):
            start = 0
            for parameter in parameters:
                stop = start + parameter.partition_numel()
                yield self._names[id(parameter)], parameter, shard.detach()[start:stop]
                start = stop

    def _gathered(self, parameter: Any, piece: Tensor) -> Tensor:
        full = gather_equal(piece, self._group)
        return full[: parameter.ds_numel].view(parameter.ds_shape)


def _is_cut_alike(target: DTensor) -> bool:
    """Rows of a sharded parameter are the same numbers as this layout's piece of it; the same answer on every rank."""
    is_by_rows = all(placement == Shard(0) for placement in target.placements)
    return is_by_rows and target.shape[0] % target.device_mesh.size() == 0


def _span_of(parameter: Tensor, flat: Tensor) -> slice:
    """Where a parameter lies in the flat buffer of its group."""
    start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
    return slice(start, start + parameter.numel())


def gather_equal(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Equal parts of all ranks of the group, in rank order, as one tensor to read from: of one rank its part itself."""
    num_ranks = dist.get_world_size(group)
    if num_ranks == 1:
        return shard
    full = torch.empty(num_ranks * shard.numel(), dtype=shard.dtype, device=shard.device)
    gather = (
        getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    )  # renamed in torch 2.13
    gather(full, shard.contiguous(), group=group)
    return full
