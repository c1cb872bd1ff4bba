"""What a task keeps and what a computation holds at most, measured without computing: on the meta device, with flash attention as a GPU has it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from students.shapes import BackboneSpec
from teacher import vit
from teacher.batch import CropBatch, PatchMasks, StudentBatch, TeacherTargets
from teacher.chunks import SoftAssignment
from teacher.heads import Head
from teacher.losses import Objective
from teacher.shapes import HeadShape
from teacher.task import DistillationTask, SoftAssignments, TaskOptions

META = torch.device("meta")
OBJECTIVE = Objective(dino=1.0, ibot=1.0, koleo=0.1, local=1.0)


class _Functions:
    """``torch.nn.functional``, but attention keeps what the flash kernel of a GPU keeps: no matrix of tokens by tokens."""

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    @staticmethod
    def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return attended


@contextmanager
def flash_attention() -> Iterator[None]:
    """Inside, ViTs attend with the flash kernel's shapes and saved tensors."""
    with mock.patch.object(vit, "F", _Functions()):
        yield


class SavedBytes:
    """Storages that autograd keeps for the backward pass, counted once each."""

    def __init__(self, left_out: Sequence[Tensor]) -> None:
        self._left_out = {tensor.untyped_storage()._cdata for tensor in left_out}
        self._seen: dict[int, tuple[int, Any]] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        """Counts a tensor that is kept."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._left_out:
            self._seen[storage._cdata] = (storage.nbytes(), storage)  # held: addresses come again
        return tensor

    @property
    def total(self) -> int:
        """Bytes kept."""
        return sum(size for size, _ in self._seen.values())


@contextmanager
def counting_saved(left_out: Sequence[Tensor]) -> Iterator[SavedBytes]:
    """Inside, what is kept for the backward pass is counted, without the storages of ``left_out``."""
    saved = SavedBytes(left_out)
    with saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        yield saved


class PeakBytes(TorchDispatchMode):
    """Inside, the most bytes that tensors made inside hold at once, after any operator; those of one device where it is named."""

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self._device_type = device_type
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs or {}))
            if isinstance(leaf, Tensor)
        }
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if not isinstance(leaf, Tensor):
                continue
            storage, is_counted = (
                leaf.untyped_storage(),
                self._device_type in (None, leaf.device.type),
            )
            if is_counted and storage._cdata not in given:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return made


def meta_task(
    spec: BackboneSpec, heads: tuple[HeadShape, HeadShape], dtype: torch.dtype
) -> DistillationTask:
    """A student of ``spec`` without memory."""
    options = TaskOptions(masks_input=False, mean=(0.5,) * 3, std=(0.5,) * 3)
    with META:
        parts = spec.build(), Head(heads[0]), Head(heads[1])
        return DistillationTask(*parts, options, None, 1, koleo_is_local=True).to(dtype)


def meta_batch(
    images: int,
    sizes: tuple[int, int],
    num_locals: int,
    masked: int,
    heads: tuple[HeadShape, HeadShape],
) -> tuple[StudentBatch, SoftAssignments]:
    """Crops of two sizes, ``masked`` patches per image on a grid of patches of 16 pixels, and what they are taught."""
    grid_hw = (sizes[0] // 16, sizes[0] // 16)

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    def assignment(rows: int, head: HeadShape) -> SoftAssignment:
        logs = [empty(count, dtype=torch.float32) for count in (rows, head.prototypes)]
        return SoftAssignment(
            empty(rows, head.bottleneck), empty(head.prototypes, head.bottleneck), *logs, 0.07
        )

    crops = CropBatch(
        empty(images, 2, 3, sizes[0], sizes[0], dtype=torch.uint8),
        empty(images, num_locals, 3, sizes[1], sizes[1], dtype=torch.uint8),
    )
    flags = empty(images, 2, grid_hw[0] * grid_hw[1], dtype=torch.bool)
    rows = images * masked
    targets = TeacherTargets(
        empty(images, 2, heads[0].bottleneck), empty(rows, heads[1].bottleneck)
    )
    batch = StudentBatch(crops, PatchMasks(flags, (masked,) * images), targets, grid_hw, 0, 4096)
    return batch, SoftAssignments(assignment(2 * images, heads[0]), assignment(rows, heads[1]))
