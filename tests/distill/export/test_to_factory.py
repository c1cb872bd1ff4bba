"""Custom students for their own factory and as ONNX: what is written gives the student's features, without distill."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill.errors import CheckpointError, UserError
from distill.export.export import DTYPES, Dtype, Exported, export_network
from distill.export.licences import Licences, Terms
from distill.export.onnx import write_onnx
from distill.export.save import ExportFacts, write_backbone
from distill.export.verify import our_features, probes
from distill.listing.extensions import ExtensionKind, find
from distill.weights.load import load_backbone
from students.custom import probe
from tests.support.custom_nets import ARGS, forget, write_module, write_student
from tests.support.exports import BACKGROUND, INPUTS, VIT, names, write_network

NAME = "exported_nets"
DOCS = Path(__file__).parents[3] / "docs" / "custom-students.md"
BRANCHES = """\
from torch import nn


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.stride = 4, 8
        self.layer = nn.Conv2d(3, 4, 8, 8)

    def forward(self, image):
        patch_map = self.layer(image)
        if patch_map.mean() > 5:
            patch_map = patch_map + 1
        return patch_map.mean(dim=(2, 3)), patch_map
"""


@pytest.fixture
def student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    factory = write_module(tmp_path, NAME)
    monkeypatch.chdir(tmp_path)
    forget(factory)
    yield write_student(tmp_path / "students" / "mine", factory)[0]
    forget(factory)


def export(source: Path, form: str, dtype: Dtype = "fp32", **background: Any) -> Exported:
    told = type(BACKGROUND)(**{**vars(BACKGROUND), **background})
    target = source.parent.parent / "export" / form / source.name
    exporter = find(ExtensionKind.EXPORTER, form, "--to")
    return export_network(source.name, source, target, exporter, dtype, told, INPUTS)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_network__the_factory_gives_the_same_bits(student: Path, dtype: Dtype) -> None:
    done = export(student, "factory", dtype)
    assert (done.parity.class_token, done.parity.patch_tokens) == (0.0, 0.0)
    assert names(done.folder) == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "distill.json",
    }
    config = json.loads((done.folder / "config.json").read_text())
    assert (config["factory"], config["args"]) == (f"{NAME}:Normed", ARGS)
    assert (config["width"], config["stride"]) == (16, 8)
    stored = load_file(done.folder / "model.safetensors")
    assert stored["layers.1.running_var"].dtype == DTYPES[dtype]
    assert int(stored["layers.1.num_batches_tracked"]) == 7
    backbone = load_backbone(done.folder)[0]
    expected = our_features(student, DTYPES[dtype])
    for pixels, (class_token, patch_tokens) in zip(probes(8, 3), expected, strict=True):
        with torch.no_grad():
            found = backbone(pixels)
        assert torch.equal(found.class_token, class_token)
        assert torch.equal(found.patch_tokens, patch_tokens)


def test_export_network__the_cards_code_runs_without_distill(student: Path) -> None:
    licences = Licences((Terms("big", ("cc0-1.0",), files=("LICENSE",)),), {"LICENSE": b"CC0"})
    done = export(student, "factory", licences=licences)
    card = (done.folder / "README.md").read_text()
    assert "library_name: pytorch" in card and "license: cc0-1.0" in card
    assert (done.folder / "LICENSE").read_bytes() == b"CC0"
    block = card.split("```python\n")[1].split("```")[0]
    block = block.replace('folder = "mine"', f'folder = "{done.folder}"')
    block += "import sys\nassert 'distill' not in sys.modules\n"
    block += "torch.save((pixels, class_feature, patch_map), 'found.pt')\n"
    subprocess.run([sys.executable, "-c", block], check=True, cwd=student.parent.parent)
    pixels, class_feature, patch_map = torch.load(student.parent.parent / "found.pt")
    with torch.no_grad():
        ours = load_backbone(student)[0](pixels)
    assert torch.equal(class_feature, ours.class_token)
    assert torch.equal(patch_map.flatten(2).transpose(1, 2), ours.patch_tokens)


def test_documented_reading__gives_the_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, reading = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S)
    (tmp_path / "mynet.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    forget("mynet:Pyramid")
    spec = probe("mynet:Pyramid", '{"width": 48}')
    facts = ExportFacts(64, INPUTS.mean, INPUTS.std, {})
    source = tmp_path / "runs" / "mine" / "students" / "pyramid"
    write_backbone(source, spec.build().state_dict(), spec, facts)
    export(source, "factory")
    space: dict[str, Any] = {}
    exec(compile(reading, str(DOCS), "exec"), space)
    (pixels, *_) = probes(8, 3)
    with torch.no_grad():
        class_feature, _ = space["network"](pixels)
        assert torch.equal(class_feature, load_backbone(source)[0](pixels).class_token)
    forget("mynet:Pyramid")


def test_export_network__a_network_that_no_factory_makes(tmp_path: Path) -> None:
    source = write_network(tmp_path / "students" / "small", VIT)
    with pytest.raises(CheckpointError, match="small: comes with distill, no factory makes it"):
        export(source, "factory")
    assert not (tmp_path / "export").exists()


@pytest.fixture
def _unchecked_shapes() -> Iterator[None]:
    """The exporter traces with symbolic sizes, which the shape checks of the suite refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow  # torch.onnx.export
@pytest.mark.usefixtures("_unchecked_shapes")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_network__onnx_of_a_network_with_batch_norm(student: Path, dtype: Dtype) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    done = export(student, "onnx", dtype)
    assert done.parity.checked_with == f"onnxruntime {runtime.__version__}"
    assert done.parity.class_token is not None and done.parity.class_token < 1e-5  # fp32 rounding
    assert done.parity.patch_tokens is not None and done.parity.patch_tokens < 1e-5
    session = runtime.InferenceSession(done.folder / "model.onnx")
    for shape in ((1, 3, 8, 88), (5, 3, 40, 16)):  # none was seen before
        (patches,) = session.run(["patch_tokens"], {"pixel_values": np.zeros(shape, np.float32)})
        assert patches.shape == (shape[0], shape[2] * shape[3] // 64, 16)


@pytest.mark.slow  # torch.export
@pytest.mark.usefixtures("_unchecked_shapes")
def test_write_onnx__a_network_that_looks_at_numbers_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    (tmp_path / "branching_nets.py").write_text(BRANCHES)
    monkeypatch.chdir(tmp_path)
    spec = probe("branching_nets:Branching", "{}")
    with pytest.raises(UserError, match="cannot be traced with free batch, height") as refused:
        write_onnx(spec.build(), spec, tmp_path / "model.onnx")
    assert "\n" not in refused.value.message and not (tmp_path / "model.onnx").exists()
    assert "--to factory" in refused.value.fix
