"""Parts of networks that torch's compiler joins into few kernels: blocks, and the chunks of Sinkhorn and of the cross-entropy.

    blocks of ViT and ConvNeXt    one code for all blocks of a kind; a graph for each shape of their input
    a custom student              all of it, where it is one graph
    chunks of logits              few shapes (``teacher.chunks``); temperatures are tensors

On a GPU logits are not written at all where kernels serve (``distill.engine.logit_kernels``).

Everything else stays as written: embeddings, last norm, heads' layers, KoLeo, the optimizer. The forward
*function* of a block is compiled, not its call, so hooks around it (FSDP) stay outside.
Names of parameters do not change, nor do files.

Not compiled, which the events of a run note: blocks under stochastic depth, whose rows change in number at every step;
custom students with BatchNorm, or of more than one graph. ``distill.engine.compile_choice`` decides where a
recipe compiles at all.
"""

from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn

from distill.engine.logit_kernels import logit_steps
from distill.runfolder.events import Event, note
from students.convnext import ConvNeXtBlock
from students.custom import PROBE_STRIDES, Adapted
from teacher.chunks import AS_WRITTEN, ChunkSteps, Prototypes
from teacher.vit import Block

BLOCKS = (Block, ConvNeXtBlock)
MOST_SHAPES = 1024  # of one code in a process: networks, crops of two kinds and their sizes, with and without gradients


def compile_trained(task: nn.Module, name: str, run_folder: Path | None) -> None:
    """Compiles what can be compiled of a network in training; in the run's events, why some of it is left as it is.

    ``run_folder``: None on ranks that report nothing.
    """
    for line in compile_parts(task):
        if run_folder is not None and (run_folder / "job.json").is_file():
            note(run_folder, Event("not compiled", f"{name}: {line}", name))


def compile_parts(network: nn.Module, backend: str = "inductor") -> list[str]:
    """Compiles what can be compiled of a task or a teacher, each at its first use. Nothing runs but a probe of a custom student.

    Returns:
        Why some of it is left as it is, a line each.
    """
    allow_shapes()
    has_depth = getattr(getattr(network, "options", None), "survival", 1.0) < 1.0
    forwards: dict[type, Callable[..., Any]] = {
        kind: torch.compile(kind.forward, backend=backend, fullgraph=True, dynamic=False)
        for kind in BLOCKS
    }
    steps, lines = compiled_steps(backend), []
    for module in network.modules():
        if isinstance(module, Prototypes):
            chosen, why = logit_steps(module.weight, steps)
            module.use_steps(chosen)
            lines += [why] if why and why not in lines else []
        elif isinstance(module, Adapted):
            lines += _compile_custom(module, backend)
        elif isinstance(module, BLOCKS) and not has_depth:
            _replace_forward(module, forwards[type(module)])
    if has_depth:
        lines.append("blocks are not compiled: stochastic depth leaves other rows at every step")
    return lines


def allow_shapes() -> None:
    """One code may be compiled for more shapes than torch's limit of 8, in this process."""
    config: Any = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = MOST_SHAPES


def compiled_steps(backend: str = "inductor") -> ChunkSteps:
    """What is done with a chunk of logits, compiled for each shape."""
    steps = [
        torch.compile(step, backend=backend, fullgraph=True, dynamic=False)
        for step in vars(AS_WRITTEN).values()
    ]
    return ChunkSteps(*steps)


def _replace_forward(module: nn.Module, compiled: Callable[..., Any]) -> None:
    if not isinstance(vars(module).get("forward"), MethodType):  # a shared backbone comes twice
        module.forward = MethodType(compiled, module)


def _compile_custom(adapted: Adapted, backend: str) -> list[str]:
    """Compiles the network of a custom student, if it is one graph."""
    if adapted.spec.has_batch_norm:
        return ["not compiled: BatchNorm collects statistics beside its graph"]
    network = adapted.network
    forward = type(network).forward
    weight = next(network.parameters())
    sides = [adapted.stride * patches for patches in PROBE_STRIDES]
    pixels = weight.new_zeros(2, adapted.spec.in_channels, *sides)
    probe = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=False)
    devices = [weight.device] if weight.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            probe(network, pixels)
    except Exception as error:  # code from outside, and any reason of the compiler
        return [f"not compiled: it is not one graph ({_first_line(error)})"]
    compiled = torch.compile(forward, backend=backend, fullgraph=True, dynamic=False)
    _replace_forward(network, compiled)
    return []


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
