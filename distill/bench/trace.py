"""Counts what a device would execute: kernels, FLOPs and bytes of the product's code, on the meta device at true sizes.

Every operator that reaches the device is one launch, or as many as torch's CUDA code starts for it (``LAUNCHES``).
Bytes are those of its inputs and outputs: nothing is taken to stay in a cache. FLOPs are torch's formulas.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Operators that start no kernel: they make views, or memory that is not written
FREE = frozenset(
    [
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "detach",
        "lift_fresh",
        "resize_",
        "_unsafe_view",
        "alias",
    ]
)
TILED = frozenset(["gather_tiles", "scatter_tiles"])  # of ``teacher.kernels``: products in tiles
MATMULS = TILED | {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
# Kernels of one call in torch's CUDA code, where it is not one
LAUNCHES: Mapping[str, int] = {
    "logsumexp": 5,
    "native_layer_norm_backward": 3,
    "convolution_backward": 3,
    "index_put_": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
}
LOGSUMEXP_PASSES = 6  # maximum, difference (in, out), exponential (in, out), sum
TILES = ((128, 128), (128, 192), (128, 256))  # rows and columns that one processor computes at once
PROCESSORS = 132  # of an H100


Made = TypeVar("Made")


@dataclass(frozen=True)
class Counts:
    """What some work takes. ``tiled_flops``: of matrix products, with those of tiles and waves that are not full."""

    matmuls: int = 0
    others: int = 0
    flops: float = 0.0
    tiled_flops: float = 0.0
    matmul_bytes: int = 0
    other_bytes: int = 0

    @property
    def launches(self) -> int:
        """Kernels."""
        return self.matmuls + self.others

    def plus(self, other: "Counts", times: int = 1) -> "Counts":
        """These and ``times`` as many of the others."""
        added = {
            each.name: getattr(self, each.name) + times * getattr(other, each.name)
            for each in fields(self)
        }
        return Counts(**added)

    def minus(self, other: "Counts") -> "Counts":
        """What remains without the others."""
        return self.plus(other, -1)


class FlashAttention(TorchFunctionMode):
    """Inside, attention without a mask is the flash kernel that a GPU takes, whatever the device."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention and len(args) == 3 and not kwargs:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return func(*args, **(kwargs or {}))


class CountingMode(TorchDispatchMode):
    """Inside, every operator is counted; ``by_name`` has launches by operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = Counts()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.is_view or name in FREE:
            return made
        launches, size = LAUNCHES.get(name, 1), _bytes_of(name, func, args, kwargs, made)
        self.by_name[name] += launches
        formula = flop_registry.get(func.overloadpacket)
        flops = float(formula(*args, **(kwargs or {}), out_val=made)) if formula else 0.0
        if name in MATMULS:
            counted = Counts(launches, 0, flops, flops / _fill_of(name, made), size, 0)
        else:
            counted = Counts(0, launches, flops, flops, 0, size)
        self.total = self.total.plus(counted)
        return made


def count(work: Callable[[], Made]) -> tuple[Counts, Made]:
    """Runs some work, and returns what it takes beside what it made."""
    with FlashAttention(), CountingMode() as mode:
        made = work()
    return mode.total, made


def _bytes_of(name: str, func: Any, args: Any, kwargs: Any, made: Any) -> int:
    read = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
    written = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
    if name == "logsumexp":
        return LOGSUMEXP_PASSES * _size(read[0])
    if name == "copy_":
        return _size(read[0]) + _size(read[1])
    if name in ("fill_", "zero_"):
        return _size(read[0])
    if not written:  # lists that are changed where they are
        changed = [
            leaf
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(value)
        ]
        written = [leaf for leaf in changed if isinstance(leaf, Tensor)]
    return sum(map(_size, read)) + sum(map(_size, written))


def _size(tensor: Tensor) -> int:
    """Bytes of memory behind a tensor; a value that is repeated by its strides is read once."""
    if not tensor.numel():
        return 0
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _fill_of(name: str, made: Any) -> float:
    """The part of its tiles' work that a matrix product does, with the best tiles: their edges and the last wave are not full."""
    if name in TILED or name.startswith("convolution"):
        return 1.0
    *batch, rows, columns = made.shape
    if not made.numel():
        return 1.0
    fills = []
    for height, width in TILES:
        tiles = math.prod(batch) * math.ceil(rows / height) * math.ceil(columns / width)
        waves = math.ceil(tiles / PROCESSORS)
        fills.append(made.numel() / (waves * PROCESSORS * height * width))
    return max(fills)
