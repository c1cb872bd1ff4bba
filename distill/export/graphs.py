"""Graphs of onnx as networks that can be scored and timed."""

import importlib
import os
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.export.int8 import INT8_FILE
from distill.export.onnx import FEATURES
from distill.export.to_onnx import FILE
from teacher.batch import Features

GRAPHS = {"onnx": FILE, "onnx int8": INT8_FILE}


class Graph(nn.Module):
    """A graph in onnxruntime on the CPU; ``threads``: of one operator, 0 for all cores of the process."""

    def __init__(self, path: Path, stride: int, threads: int = 0) -> None:
        super().__init__()
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads, options.log_severity_level = 1, 3
        self._session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._stride = stride

    def forward(self, pixels: Float[Tensor, "images channels height width"]) -> Features:
        found = self._session.run(list(FEATURES), {"pixel_values": pixels.numpy()})
        grid = pixels.shape[2] // self._stride, pixels.shape[3] // self._stride
        return Features(torch.from_numpy(found[0]), torch.from_numpy(found[1]), grid)


def graphs_of(name: str, weights: Path) -> dict[str, Path]:
    """Graphs of a network that were exported beside its weights, or in its run by ``--to onnx``; by what tables call them."""
    beside = weights if weights.is_dir() else weights.parent
    run = beside.parent.parent if beside.parent.name == "students" else beside.parent
    for folder in (beside, run / "export" / "onnx" / name):
        found = {what: folder / file for what, file in GRAPHS.items() if (folder / file).is_file()}
        if found:
            return found
    return {}
