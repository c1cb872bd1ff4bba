"""int8: what it changes is measured, what it costs too much is warned of, what cannot be quantised leaves nothing."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from distill.errors import SetupError, UserError
from distill.evaluate import int8
from distill.evaluate.int8 import Change, int8_exporter
from distill.export import int8 as export_int8
from distill.export.card import Inputs
from distill.export.export import export_network
from distill.export.graphs import Graph, graphs_of
from distill.export.int8 import quantise
from distill.protocols.images import Preparation
from distill.weights.containers import read_object
from tests.support.exports import BACKGROUND, names
from tests.support.graphs import write_graph
from tests.support.scored_run import MEAN, STD

pytest.importorskip("onnxruntime")
PIXELS = torch.randn(8, 3, 16, 24, generator=torch.Generator().manual_seed(0))
USUAL = Preparation(16, MEAN, STD)


@pytest.fixture
def _unchecked_shapes() -> Iterator[None]:
    """The exporter traces with symbolic sizes, which the shape checks of the suite refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_change__warns_above_a_drop_of_two_hundredths_and_below_nine_tenths() -> None:
    good = Change(0.70, 0.681, 0.9, 0.5, 40)
    assert good.warnings == ()
    assert good.describe().startswith("int8: k-NN 0.700 to 0.681, mutual k-NN with fp32 0.900")
    bad = Change(0.70, 0.679, 0.899, 0.95, 40)
    assert bad.warnings == (
        "warning: int8 costs 0.021 of k-NN, more than 0.02",
        "warning: int8 keeps 0.899 of the nearest images, less than 0.9",
    )
    assert bad.to_json()["knn"] == {"fp32": 0.70, "int8": 0.679, "k": 5}
    few = Change(None, None, None, None, 9)
    assert few.warnings == () and few.describe() == "int8: too few images to measure (9 images)"


def test_quantise__leaves_the_patch_embedding_out_and_little_changes(tmp_path: Path) -> None:
    onnx = importlib.import_module("onnx")
    source = write_graph(tmp_path / "model.onnx")
    quantise(source, tmp_path / "small.onnx", [PIXELS])
    nodes = {each.name: each for each in onnx.load(tmp_path / "small.onnx").graph.node}
    assert nodes["embed"].input[1] == "embedding"
    assert nodes["layer_1"].input[1] != "layer"
    ours, theirs = (Graph(path, 8)(PIXELS) for path in (source, tmp_path / "small.onnx"))
    assert ours.grid_hw == theirs.grid_hw == (2, 3)
    assert ours.class_token.shape == (8, 4) and ours.patch_tokens.shape == (8, 6, 4)
    spread = ours.class_token.std()
    assert 0 < (ours.class_token - theirs.class_token).abs().max() < 0.2 * spread


def test_quantise__a_graph_without_products_is_one_line_and_no_file(tmp_path: Path) -> None:
    source = write_graph(tmp_path / "model.onnx", has_layer=False)
    with pytest.raises(UserError, match=r"--int8: the network has no MatMul, Gemm, Conv beside"):
        quantise(source, tmp_path / "small.onnx", [PIXELS])
    wrong = write_graph(tmp_path / "other.onnx")
    with pytest.raises(UserError, match="cannot be quantised by onnxruntime"):
        quantise(wrong, tmp_path / "small.onnx", [PIXELS[:, :2]])
    assert names(tmp_path) == {"model.onnx", "other.onnx"}


def test_int8_exporter__wants_onnxruntime_and_images(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = ("vit", run_folder / "students" / "vit", None)
    (run_folder / "data" / "train").rename(run_folder / "data" / "gone")
    with pytest.raises(UserError, match="there are no images to calibrate on") as failed:
        int8_exporter(run_folder, network, USUAL, None, lambda _: None)
    assert "--calibrate SRC" in failed.value.fix
    right = export_int8.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "onnxruntime" else right(name)
    )
    with pytest.raises(SetupError, match="--int8: onnxruntime not installed"):
        int8_exporter(run_folder, network, USUAL, None, lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "conv"])
def test_int8_exporter__a_folder_with_both_graphs_and_what_changed(
    name: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch, _unchecked_shapes: None
) -> None:
    monkeypatch.setattr(int8, "LEAST_MUTUAL", 1.01)  # every network is warned of
    monkeypatch.setattr(int8, "FEWEST_IMAGES", 11)
    source, folder = run_folder / "students" / name, run_folder / "export" / "onnx" / name
    exporter = int8_exporter(run_folder, (name, source, None), USUAL, None, lambda _: None)
    inputs = Inputs(16, MEAN, STD)
    done = export_network(name, source, folder, exporter, "fp32", BACKGROUND, inputs)
    assert {"model.onnx", "model.int8.onnx"} <= names(folder)
    measured = read_object(folder / "distill.json")["export"]["int8"]
    assert measured["images"] == 12 and measured["mutual_knn"]["class"] > 0.7
    assert abs(measured["knn"]["fp32"] - measured["knn"]["int8"]) < 0.3
    (line,) = done.measured.warnings
    assert line in (folder / "README.md").read_text() and "less than 1.01" in line
    found = graphs_of(name, source)
    assert found == {
        "onnx": folder / "model.onnx",
        "onnx int8": folder / "model.int8.onnx",
    }
