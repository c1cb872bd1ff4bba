"""What compiled parts take in place of the same as written: kernels and bytes by the compiler itself.

Parts are those of ``distill.engine.compiled``. While a micro-batch is counted on the meta device, each call of a part is noted
with the shapes of its inputs. Each distinct one is then given to inductor at its true size, with memory that nothing is
written to: for the CPU, since a machine without a GPU has no other, and only as far as the code of its kernels. Nothing is
built or run.

    launches   entries of inductor's schedule that become a kernel, and one call (or what ``distill.bench.trace`` counts for it)
               for each operator that it leaves to a library: matrix products, convolutions, attention
    bytes      of the buffers that each of them reads and writes, once each; their sum is inductor's ``num_bytes_accessed``

Loss and Sinkhorn in bf16 are kernels without logits (``teacher.kernels``), counted as operators: a launch each, products by their
FLOPs, and the bytes of inputs and outputs among those of products.

Inductor's ``generated_kernel_count`` is not taken for the kernels: for a CPU it has the loops of each by themselves, main
part and rest, and is two to three times the number of kernels of a GPU.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from distill.bench.trace import LAUNCHES, MATMULS, Counts, count
from distill.engine.compiled import BLOCKS, allow_shapes
from teacher.chunks import AS_WRITTEN, ChunkSteps, Prototypes
from teacher.kernels import KernelSteps

CPU_NAMES = {  # of a library's calls, to those of a GPU
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "_scaled_dot_product_flash_attention_backward",
}


Key = tuple[Any, ...]


@dataclass
class Part:
    """One code with inputs of one shape: how often it was called, and the call, on meta tensors."""

    key: Key
    function: Callable[..., Any]
    module: nn.Module | None
    args: Sequence[Any]
    trains: bool
    calls: int = 0


@dataclass(frozen=True)
class Pass:
    """Forward and backward pass of something."""

    forward: Counts = field(default_factory=Counts)
    backward: Counts = field(default_factory=Counts)


class Parts:
    """Notes the calls of parts of a network on the meta device."""

    def __init__(self, network: nn.Module) -> None:
        """From now on every call of a part of ``network`` is noted, and made as written."""
        self._found: dict[Key, Part] = {}
        for module in network.modules():
            if isinstance(module, Prototypes):
                module.use_steps(self.steps())
            elif isinstance(module, BLOCKS):
                self._watch(module)

    def steps(self) -> KernelSteps:
        """As on a GPU: kernels without logits, which are counted as operators, and where they do not serve chunks, noted."""
        chunks = ChunkSteps(*(self._noting(step) for step in vars(AS_WRITTEN).values()))
        return KernelSteps(chunks)

    def _watch(self, module: nn.Module) -> None:
        forward = type(module).forward

        def noted(itself: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._note(forward, itself, (*args, *kwargs.values()))
            return forward(itself, *args, **kwargs)

        module.forward = MethodType(noted, module)

    def _noting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            self._note(step, None, args)
            return step(*args)

        return noted

    def _note(
        self, function: Callable[..., Any], module: nn.Module | None, args: Sequence[Any]
    ) -> None:
        trains = module is not None and torch.is_grad_enabled()
        weights = () if module is None else tuple(p.shape for p in module.parameters())
        leaves, tree = tree_flatten(list(args))
        shapes = [(x.shape, x.dtype) for x in leaves if isinstance(x, Tensor)]
        key = function, weights, trains, str(tree), str(shapes)
        part = self._found.setdefault(key, Part(key, function, module, args, trains))
        part.calls += 1

    def take(self) -> list[Part]:
        """The parts that were called since the last time."""
        found, self._found = list(self._found.values()), {}
        return found


class Compiler:
    """Compiles parts, each distinct one once, and finds what that changes."""

    def __init__(self) -> None:
        self._changes: dict[Key, Pass] = {}

    def change(self, parts: Sequence[Part]) -> Pass:
        """What the calls of parts take more than as written: less than nothing, as a rule. FLOPs stay."""
        forward, backward = Counts(), Counts()
        for part in parts:
            if part.key not in self._changes:
                written, compiled = as_written(part), as_compiled(part)
                self._changes[part.key] = Pass(
                    _without_flops(compiled.forward.minus(written.forward)),
                    _without_flops(compiled.backward.minus(written.backward)),
                )
            changed = self._changes[part.key]
            forward = forward.plus(changed.forward, part.calls)
            backward = backward.plus(changed.backward, part.calls)
        return Pass(forward, backward)


def _without_flops(counts: Counts) -> Counts:
    return replace(counts, flops=0.0, tiled_flops=0.0)


def as_written(part: Part) -> Pass:
    """What one call takes on the meta device, operator by operator."""
    module, args = _inputs(part, torch.device("meta"))
    with torch.set_grad_enabled(part.trains):
        forward, made = count(lambda: part.function(*module, *args))
    if not part.trains:
        return Pass(forward)
    wanted = [x for x in (*tree_leaves(args), *module[0].parameters()) if _trains(x)]
    gradient = torch.empty_like(made)
    backward, _ = count(lambda: torch.autograd.grad(made, wanted, gradient))
    return Pass(forward, backward)


def as_compiled(part: Part) -> Pass:
    """What inductor makes of one call, in one graph for each pass."""
    module, args = _inputs(part, torch.device("cpu"))
    allow_shapes()
    torch._dynamo.reset()
    with torch.set_grad_enabled(part.trains), _kernels() as passes:
        compiled = torch.compile(part.function, fullgraph=True, dynamic=False)
        with suppress(_NotRunError):
            compiled(*module, *args)
    torch._dynamo.reset()
    return Pass(*passes)


def _trains(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _inputs(part: Part, device: torch.device) -> tuple[list[Any], list[Any]]:
    """The module, if there is one, and the other inputs, on a device; of memory that nothing is written to."""

    def empty(tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor, device=device)
        return made.requires_grad_(part.trains and tensor.requires_grad)

    args = tree_map_only(Tensor, empty, list(part.args))
    if part.module is None:
        return [], args
    watched = part.module.__dict__.pop("forward")
    module = copy.deepcopy(part.module)
    part.module.__dict__["forward"] = watched
    return [module.to_empty(device=device)], args


class _NotRunError(Exception):
    """The code of a graph is there, and that was all."""


@contextmanager
def _kernels() -> Iterator[list[Counts]]:
    """Inside, graphs are compiled as far as to the code of their kernels; gets what each takes, in their order."""
    from torch._functorch import config as passes_config
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering

    passes: list[Counts] = []
    build = GraphLowering.compile_to_module

    def counted(graph: Any) -> Any:
        graph.codegen()
        passes.append(_counts(graph.scheduler.nodes))
        return _Nothing()

    GraphLowering.compile_to_module = counted  # type: ignore[method-assign, assignment]
    try:
        with (
            config.patch(force_disable_caches=True, compile_threads=1),
            passes_config.patch(force_non_lazy_backward_lowering=True),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message=".*force_disable_caches")
            yield passes
    finally:
        GraphLowering.compile_to_module = build  # type: ignore[method-assign]


class _Nothing:
    """In place of the module of a graph."""

    __file__ = key = ""

    def call(self, *_: object) -> None:
        """Ends the call of a graph."""
        raise _NotRunError


def _counts(nodes: Sequence[Any]) -> Counts:
    """What a graph takes: inductor's kernels, and the calls that it leaves to libraries."""
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

    total = Counts()
    for node in nodes:
        size = int(node.get_read_write_buffers_sizes())
        if isinstance(node, NopKernelSchedulerNode) or not size:  # parts of what another node makes
            continue
        name = _library_call(node.node) if isinstance(node, ExternKernelSchedulerNode) else ""
        launches = LAUNCHES.get(name, 1)
        if name in MATMULS:
            total = total.plus(Counts(matmuls=launches, matmul_bytes=size))
        else:
            total = total.plus(Counts(others=launches, other_bytes=size))
    return total


def _library_call(kernel: Any) -> str:
    """The operator that is called of a library."""
    overload = getattr(kernel, "op_overload", None)
    text = str(getattr(kernel, "python_kernel_name", ""))
    name = text.split(".")[-1] if overload is None else overload._schema.name.split("::")[1]
    return CPU_NAMES.get(name, name)
