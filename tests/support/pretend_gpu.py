"""A GPU that is not there: tensors of this process's memory that say they are elsewhere, and errors where a GPU would have them.

    tensor on the pretended device   its storage is marked; ``device`` and ``is_cuda`` say so
    an operator whose tensors lie on both sides   ``WrongDeviceError``, unless a GPU allows it (scalars, copies, indices)
    asking such a tensor for its value            counted in ``asked``, by the package that asks

Every operator of forward and backward passes is seen, DeepSpeed's and those of collectives too. Speed,
streams, kernels and NCCL are not pretended, and nothing is compiled.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.engine import compile_choice

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
ASKING = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero"}
PACKAGES = ("distill", "students", "teacher", "deepspeed")
MAY_MIX = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_")


class WrongDeviceError(BaseException):
    """No ``Exception``, for which a student would be parked and the job go on."""


class PretendedGpu(TorchFunctionMode):
    """What Python sees of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self._marked: dict[
            int, StorageWeakRef
        ] = {}  # weak references keep the numbers from being used again

    def has(self, tensor: Tensor) -> bool:
        """The tensor is on the pretended device."""
        with torch._C.DisableTorchFunction():
            found = self._marked.get(tensor.untyped_storage()._cdata)
        return found is not None and not found.expired()

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor, on the pretended device from now on."""
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            self._marked[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        owner = getattr(function, "__self__", None)
        if name == "__get__" and owner in (Tensor.device, Tensor.is_cuda, Tensor.is_cpu):
            return self._place(owner, args[0])
        if name in ASKING and args and isinstance(args[0], Tensor) and self.has(args[0]):
            self.asked[caller()] += 1
        if name == "numpy" and self.has(args[0]):
            raise WrongDeviceError("numpy of a tensor on the GPU")
        if name in {"to", "cpu", "cuda"} and isinstance(args[0], Tensor):
            return self._move(name, args[0], args[1:], named)
        if name == "backward":
            return self._backward(args[0], named.get("gradient"))
        named.pop("pin_memory", None)
        where = named.get("device")
        if where is None:
            return function(*args, **named)
        made = function(*args, **{**named, "device": CPU})
        is_gpu = torch.device(where).type == "cuda"
        if is_gpu:
            return self.take(made)
        return made.clone() if isinstance(made, Tensor) and self.has(made) else made

    def _place(self, attribute: Any, tensor: Tensor) -> Any:
        on_gpu = self.has(tensor)
        if attribute is Tensor.device:
            return GPU if on_gpu else CPU
        return on_gpu if attribute is Tensor.is_cuda else not on_gpu

    def _backward(self, loss: Tensor, gradient: Tensor | None) -> None:
        """The engine, with what Python does on the way under the same eyes."""
        with self:
            first = torch.ones_like(loss) if gradient is None else gradient
            _engine_run_backward(
                (loss,), (first,), False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    def _move(
        self, name: str, tensor: Tensor, rest: Sequence[Any], named: dict[str, Any]
    ) -> Tensor:
        """``to``, ``cpu`` and ``cuda``."""
        where = named.pop("device", {"cpu": CPU, "cuda": GPU}.get(name))
        dtype = named.pop("dtype", None)
        for value in rest:
            if isinstance(value, Tensor):
                where, dtype = value.device, value.dtype
            elif isinstance(value, (torch.device, str)):
                where = value
            elif isinstance(value, torch.dtype):
                dtype = value
        is_on, is_wanted = self.has(tensor), self.has(tensor)
        if where is not None:
            is_wanted = torch.device(where).type == "cuda"
        if is_on and not is_wanted and not named.get("non_blocking"):
            self.asked[caller()] += 1
        if is_on == is_wanted:
            moved: Tensor = tensor.to(dtype or tensor.dtype, **named)
            return moved
        moved = tensor.to(dtype or tensor.dtype, **{**named, "copy": True})
        if is_wanted:
            return self.take(moved)
        self._forget(moved)
        return moved

    def _forget(self, tensor: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            self._marked.pop(tensor.untyped_storage()._cdata, None)


class _Operators(TorchDispatchMode):
    """What is computed: operators of Python, of autograd and of collectives."""

    def __init__(self, gpu: PretendedGpu, host_groups: set[str]) -> None:
        super().__init__()
        self._gpu, self._host_groups = gpu, host_groups

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d" and "barrier" not in func.name():
            self._check_collective(func, args)
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        on_gpu = [self._gpu.has(tensor) for tensor in given]
        name = func.name().split(".")[0]
        if any(on_gpu) and not all(on_gpu) and name not in MAY_MIX:
            others = [t for t, is_on in zip(given, on_gpu, strict=True) if not is_on]
            is_scalar = torch.Tag.pointwise in func.tags and all(t.dim() == 0 for t in others)
            if not is_scalar:
                raise WrongDeviceError(
                    f"{name}: {on_gpu.count(False)} of {len(given)} tensors on the host"
                )
        result = func(*args, **(kwargs or {}))
        is_result_on_gpu = on_gpu[0] if name == "aten::copy_" else any(on_gpu)
        if is_result_on_gpu:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._gpu.take(leaf)
        return result

    def _check_collective(self, func: Any, args: Sequence[Any]) -> None:
        """NCCL takes tensors of the GPU only, a group that was made for gloo those of the host only."""
        (box,) = (
            leaf
            for leaf in tree_leaves(args)
            if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type())
        )
        is_host = dist.ProcessGroup.unbox(box).group_name in self._host_groups
        for leaf in tree_leaves(args):
            if isinstance(leaf, Tensor) and self._gpu.has(leaf) == is_host:
                place = "the GPU" if is_host else "the host"
                raise WrongDeviceError(f"{func.name()}: a tensor of {place}")


def _grouped(tensors: Any, with_indices: bool = False) -> Any:  # as torch has it
    """What optimizers ask C++, which sees where tensors really are: groups by device and dtype."""
    found = _group_tensors_by_device_and_dtype(tensors, with_indices)
    return {(lists[0][0].device, dtype): (lists, at) for (_, dtype), (lists, at) in found.items()}


class _Event:
    """Of a device that has always finished."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All is done."""
        return True

    def elapsed_time(self, _: "_Event") -> float:
        """No time passes."""
        return 0.0


class _Stream:
    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


@contextmanager
def pretending() -> Iterator[PretendedGpu]:
    """Inside, "cuda" is a device of this process, for DeepSpeed too; call after ``prepare_deepspeed``."""
    from deepspeed.accelerator import get_accelerator

    gpu, host_groups = PretendedGpu(), set[str]()
    new_group = dist.new_group

    def noted(*args: Any, **named: Any) -> Any:
        group = new_group(*args, **named)
        if named.get("backend") == "gloo":
            host_groups.add(group.group_name)
        return group

    accelerator = type(get_accelerator())
    replaced: list[Any] = [
        mock.patch.object(accelerator, "current_device_name", lambda _: str(GPU)),
        mock.patch.object(accelerator, "device_name", lambda _, index=None: str(GPU)),
        mock.patch.object(Optimizer, "_group_tensors_by_device_and_dtype", _grouped),
        mock.patch.object(dist, "new_group", noted),
        mock.patch.object(torch.cuda, "Event", _Event),
        mock.patch.object(torch.cuda, "current_stream", lambda *_: _Stream()),
        mock.patch.object(torch.cuda, "set_device", lambda _: None),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor.clone()),  # in all threads
        mock.patch.object(
            torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30)
        ),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
        mock.patch.object(compile_choice, "what_is_lacking", lambda _: "the GPU is pretended"),
    ]
    with ExitStack() as stack:
        for each in (*replaced, gpu, _Operators(gpu, host_groups)):
            stack.enter_context(each)
        yield gpu


def package_in(path: str) -> str | None:
    """Which of the packages a file belongs to."""
    parts = Path(path).parts
    return None if "tests" in parts else next((p for p in PACKAGES if p in parts), None)


def caller() -> str:
    """The innermost of the packages that is at work."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if package := package_in(frame.f_code.co_filename):
            return package
        frame = frame.f_back
    return "unknown"
