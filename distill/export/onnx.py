"""A backbone as one ONNX graph: ``pixel_values`` to ``class_token`` and ``patch_tokens``, and to ``logits`` with a classifier.

Batch, rows and columns of patches stay free; position angles are part of the graph and follow the
size of the image; sides that are no multiple of the stride are refused. The graph computes in fp32. Weights in bf16 are stored as such and widened where
they are used, so the file is half as large and runtimes need no bf16 arithmetic.
"""

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.errors import SetupError, UserError
from students.shapes import BackboneSpec

MAX_GRID = 1024  # patches per side; 16,384 px at stride 16
MAX_BATCH = 65_536
ONE_FILE_BYTES = 2**31 - 2**24  # protobuf holds 2 GiB; the graph itself needs some of it


FEATURES, LOGITS = ("class_token", "patch_tokens"), "logits"


class _NamedOutputs(nn.Module):
    """A backbone whose weights are widened to fp32, and whose features and logits are a plain tuple."""

    def __init__(self, backbone: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        named = (*self.backbone.named_parameters(), *self.backbone.named_buffers())
        weights = {name: each.float() for name, each in named if each.is_floating_point()}
        found = torch.func.functional_call(self.backbone, weights, (pixel_values,))
        features = found.class_token, found.patch_tokens
        return features if self.head is None else (*features, self.head(*features))


def require_exporter() -> None:
    """Passes when torch can write ONNX here.

    Raises:
        SetupError: a library is missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"--to onnx: {' and '.join(missing)} not installed",
            fix='pip install "distill-family[onnx]"',
        )


def write_onnx(
    backbone: nn.Module,
    spec: BackboneSpec,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    head: nn.Module | None = None,
) -> None:
    """Writes ``path``, and ``path``.data beside it when the weights do not fit into one file.

    The backbone is changed: its parameters end in ``dtype``. ``head`` takes class token and patch tokens to the
    third output, [images, classes].

    Raises:
        SetupError: the exporter's libraries are missing.
        UserError: the network cannot be traced with free batch, height and width.
    """
    require_exporter()
    graph = _NamedOutputs(backbone.to(dtype), head).eval()
    stride = spec.stride
    sample = torch.zeros(2, spec.in_channels, 3 * stride, 4 * stride)
    rows = torch.export.Dim("grid_rows", min=1, max=MAX_GRID)
    columns = torch.export.Dim("grid_columns", min=1, max=MAX_GRID)
    free = {
        0: torch.export.Dim("batch", min=1, max=MAX_BATCH),
        2: stride * rows,
        3: stride * columns,
    }
    try:
        with _quiet():
            program = torch.onnx.export(
                graph,
                (sample,),
                dynamo=True,
                dynamic_shapes=(free,),
                input_names=["pixel_values"],
                output_names=[*FEATURES, *([] if head is None else [LOGITS])],
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _cannot(error) from error
    assert program is not None, "torch.onnx.export with dynamo=True returns a program"
    patches = program.model.graph.outputs[1]
    assert patches.shape is not None, "the exporter knows the rank of each output"
    patches.shape = type(patches.shape)(["batch", "patches", spec.width])
    _refuse_broken_patches(program.model.graph, stride)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    num_bytes = sum(each.numel() * each.element_size() for each in backbone.parameters())
    program.save(str(path), external_data=num_bytes > ONE_FILE_BYTES)


def _cannot(error: Exception) -> UserError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return UserError(
        f"--to onnx: the network cannot be traced with free batch, height and width ({reason})",
        fix="Let its forward function treat every size alike, or use --to factory.",
    )


def _refuse_broken_patches(graph: Any, stride: int) -> None:
    """Adds an operator that fails, as our network does, where a side is no multiple of the stride.

    Runtimes do not look at what is known of free sizes: the last pixels would be dropped without a word. A
    shape is looked up by the remainders of both sides; only remainder 0 is in the table.
    """
    ir = importlib.import_module("onnx_ir")
    (pixels,) = graph.inputs
    users = [(use.node, use.idx) for use in pixels.uses()]
    table = ir.tensor(np.ones((1, len(pixels.shape)), np.int64), name="only_remainder_0")
    period, axes = (
        ir.tensor(np.array(value, np.int64), name=name)
        for value, name in (([stride, stride], "strides"), ([0], "sides"))
    )
    constants = [ir.node("Constant", [], {"value": each}) for each in (table, period, axes)]
    ones, strides, sides = (node.outputs[0] for node in constants)
    size = ir.node("Shape", [pixels], {"start": 2})
    remainders = ir.node("Mod", [size.outputs[0], strides])
    total = ir.node("ReduceSum", [remainders.outputs[0], sides], {"keepdims": 0})
    name = f"height_and_width_must_be_multiples_of_{stride}"
    shape = ir.node("Gather", [ones, total.outputs[0]], {"axis": 0}, name=name)
    checked = ir.node("Expand", [pixels, shape.outputs[0]])
    checked.outputs[0].shape, checked.outputs[0].dtype = pixels.shape, pixels.dtype
    graph.insert_before(graph[0], [*constants, size, remainders, total, shape, checked])
    for node, index in users:
        node.replace_input_with(index, checked.outputs[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's words about torchvision and about its deprecated calls."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
