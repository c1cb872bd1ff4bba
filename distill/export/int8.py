"""A graph of onnx with int8 weights and activations, by onnxruntime's static quantisation.

quantised   matrix products with weights, and convolutions: weights int8 per output channel, inputs uint8 with one
            range each, taken from calibration images (QDQ format); results of matrix products stay in fp32
left out    the patch embedding, whose input are pixels; all norms, the last one too; products of two activations
            in attention; what else is no product
"""

import importlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray
from torch import Tensor

from distill.errors import SetupError, UserError
from distill.export import to_onnx
from distill.export.exporter import Exporter

INT8_FILE = "model.int8.onnx"
PRODUCTS = ("MatMul", "Gemm", "Conv")


def require_quantiser() -> None:
    """Passes when a graph can be written and quantised here.

    Raises:
        SetupError: a library is missing.
    """
    to_onnx.EXPORTER.require()
    if importlib.util.find_spec("onnxruntime") is None:
        fix = 'pip install "distill-family[onnx]"'
        raise SetupError("--int8: onnxruntime not installed", fix=fix)


def with_int8(calibration: Sequence[Float32[Tensor, "_ channels height width"]]) -> Exporter:
    """The format ``onnx`` with ``model.int8.onnx`` beside the graph; ``calibration``: batches of prepared pixels."""

    def write(name: str, source: Path, folder: Path, dtype: torch.dtype) -> None:
        to_onnx.EXPORTER.write(name, source, folder, dtype)
        quantise(folder / to_onnx.FILE, folder / INT8_FILE, calibration)

    def usage(*named: Any) -> list[str]:
        lines = to_onnx.EXPORTER.usage(*named)
        return [line.replace(to_onnx.FILE, INT8_FILE) for line in lines]

    return replace(to_onnx.EXPORTER, write=write, usage=usage, require=require_quantiser)


def quantise(
    source: Path,
    target: Path,
    calibration: Sequence[Float32[Tensor, "_ channels height width"]],
    *,
    left_out: Sequence[str] | None = None,
    products: Sequence[str] = PRODUCTS,
    has_attention: bool = False,
    wide: Sequence[str] = ("MatMul", "Gemm"),
) -> None:
    """Writes ``target``, the graph ``source`` in int8.

    Args:
        source: a graph in fp32 with the input ``pixel_values``.
        target: the new file.
        calibration: pixels as the network takes them.
        left_out: names of nodes; None for the patch embedding.
        products: types of nodes that are quantised.
        has_attention: products of two activations are quantised too.
        wide: types of nodes whose results stay in fp32.

    Raises:
        UserError: the graph has nothing to quantise, or onnxruntime cannot.
    """
    graph = importlib.import_module("onnx").load(source, load_external_data=False).graph
    nodes = graph.node
    embedding = [each.name for each in nodes if each.op_type == "Conv"][:1]
    excluded = embedding if left_out is None else list(left_out)
    if not has_attention:
        weights = {each.name for each in graph.initializer}
        excluded += [
            each.name
            for each in nodes
            if each.op_type == "MatMul" and not weights.intersection(each.input)
        ]
    if not any(each.op_type in products and each.name not in excluded for each in nodes):
        raise _cannot(f"has no {', '.join(products)} beside the patch embedding")
    kit = importlib.import_module("onnxruntime.quantization")
    try:
        with _quiet(), tempfile.TemporaryDirectory() as scratch:
            prepared = Path(scratch) / "prepared.onnx"
            importlib.import_module("onnxruntime.quantization.shape_inference").quant_pre_process(
                str(source), str(prepared), skip_symbolic_shape=True
            )
            kit.quantize_static(
                str(prepared),
                str(target),
                _Batches(calibration),
                quant_format=kit.QuantFormat.QDQ,
                per_channel=True,
                activation_type=kit.QuantType.QUInt8,
                weight_type=kit.QuantType.QInt8,
                reduce_range=True,  # 7 bits: products of 8 saturate on CPUs with AVX2 and no VNNI
                op_types_to_quantize=list(products),
                nodes_to_exclude=excluded,
                extra_options={"OpTypesToExcludeOutputQuantization": list(wide)},
            )
    except Exception as error:  # whatever the library raises, there is no graph
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _cannot(f"cannot be quantised by onnxruntime ({first})") from error


class _Batches:
    """Calibration images as onnxruntime takes them, a batch at a time."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._left: Iterator[dict[str, NDArray[np.float32]]] = iter(
            [{"pixel_values": each.numpy()} for each in batches]
        )

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The inputs of the next run; None after the last."""
        return next(self._left, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without advice to prepare the graph, which was done."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _cannot(reason: str) -> UserError:
    return UserError(f"--int8: the network {reason}", fix="Leave --int8 out; nothing was written.")
