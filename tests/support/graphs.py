"""Small graphs of onnx without torch's exporter, which takes seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_graph(path: Path, *, width: int = 4, stride: int = 8, has_layer: bool = True) -> Path:
    """Patches by a strided convolution, a layer where wanted, and their mean as class token."""
    random = np.random.default_rng(0)
    weights = {
        "embedding": random.normal(size=(width, 3, stride, stride)).astype(np.float32),
        "layer": random.normal(size=(width, width)).astype(np.float32),
        "flat": np.array([0, width, -1], np.int64),
        "axis": np.array([1], np.int64),
    }
    nodes: list[Any] = [
        helper.make_node(
            "Conv", ["pixel_values", "embedding"], ["map"], "embed", strides=[stride, stride]
        ),
        helper.make_node("Reshape", ["map", "flat"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["patches"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["patches", "layer"], ["patch_tokens"], "layer_1")
        if has_layer
        else helper.make_node("Identity", ["patches"], ["patch_tokens"]),
        helper.make_node("ReduceMean", ["patch_tokens", "axis"], ["class_token"], keepdims=0),
    ]
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["b", 3, "h", "w"])
    outputs = [
        helper.make_tensor_value_info("class_token", TensorProto.FLOAT, ["b", width]),
        helper.make_tensor_value_info("patch_tokens", TensorProto.FLOAT, ["b", "patches", width]),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "small", [pixels], outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, path)
    return path
