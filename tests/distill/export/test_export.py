"""Networks of a family in other libraries' formats: outputs agree, or nothing with a final name is left."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from distill.errors import CheckpointError, SetupError, UserError
from distill.export import to_factory, to_hf, to_meta, to_onnx, to_timm
from distill.export.card import Background
from distill.export.export import DTYPES, Dtype, Exported, export_network
from distill.export.exporter import Exporter
from distill.export.licences import Licences, Terms
from distill.export.onnx import require_exporter, write_onnx
from distill.export.save import ExportFacts, fingerprint, write_backbone
from distill.export.verify import (
    TOLERANCE,
    Parity,
    largest_differences,
    our_features,
    probes,
    verify,
)
from distill.listing.extensions import BUILTIN, ExtensionKind, find
from distill.weights.load import load_backbone
from teacher.shapes import ViTSpec
from tests.support.exports import BACKGROUND, CONVNEXT, GATED, INPUTS, VIT, names, write_network
from tests.support.stand_ins import meta_convnext, meta_vit

SPECS = {"vit": VIT, "gated": GATED, "convnext": CONVNEXT}


CC0 = Licences((Terms("big", ("cc0-1.0",), files=("LICENSE",)),), {"LICENSE": b"CC0 1.0"})


def exporter_of(form: str) -> Exporter:
    found: Exporter = find(ExtensionKind.EXPORTER, form, "--to")
    return found


def export(
    source: Path, folder: Path, form: str, dtype: Dtype = "fp32", **background: Any
) -> Exported:
    told = Background(**{**vars(BACKGROUND), **background})
    return export_network("small", source, folder, exporter_of(form), dtype, told, INPUTS)


@pytest.fixture
def _unchecked_shapes() -> Iterator[None]:
    """The exporter traces with symbolic sizes, which the shape checks of the suite refuse."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", SPECS)
def test_export_network__transformers_gives_the_same(
    kind: str, dtype: Dtype, tmp_path: Path
) -> None:
    source = write_network(tmp_path / "small", SPECS[kind])
    done = export(source, tmp_path / "out" / "small", "hf", dtype)
    assert done.parity.checked_with == f"transformers {transformers.__version__}"
    assert done.parity.class_token is not None and done.parity.class_token < 1e-5  # fp32 rounding
    assert done.parity.patch_tokens is not None and done.parity.patch_tokens < 1e-5
    assert names(tmp_path / "out") == {"small"}
    with safe_open(done.folder / "model.safetensors", "pt") as file:
        stored = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert stored == {DTYPES[dtype]}


@pytest.mark.usefixtures("_unchecked_shapes")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        pytest.param(
            kind, dtype, marks=() if (kind, dtype) == ("gated", "bf16") else pytest.mark.slow
        )
        for kind in SPECS
        for dtype in ("fp32", "bf16")
    ],
)
def test_export_network__onnxruntime_gives_the_same(
    kind: str, dtype: Dtype, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    spec = SPECS[kind]
    source = write_network(tmp_path / "small", spec)
    done = export(source, tmp_path / "out" / "small", "onnx", dtype)
    assert done.parity.checked_with == f"onnxruntime {runtime.__version__}"
    assert done.parity.class_token is not None and done.parity.class_token < 1e-5  # fp32 rounding
    assert done.parity.patch_tokens is not None and done.parity.patch_tokens < 1e-5
    assert names(done.folder) == {
        "model.onnx",
        "preprocessor_config.json",
        "README.md",
        "distill.json",
    }
    graph = (done.folder / "model.onnx").read_bytes()
    assert b".py" not in graph, "stack traces would show this machine's paths"
    session = runtime.InferenceSession(graph)
    ours = load_backbone(source)[0]
    side = spec.stride
    for height, width in ((side + 1, side), (side, 2 * side - 1), (side + side // 2,) * 2):
        with pytest.raises(Exception, match=f"height_and_width_must_be_multiples_of_{side}"):
            session.run(None, {"pixel_values": np.zeros((1, 3, height, width), np.float32)})
    for rows, (high, wide) in ((1, (1, 1)), (3, (2, 12)), (1, (14, 3))):  # none was seen before
        pixels = torch.randn(rows, 3, high * spec.stride, wide * spec.stride)
        (patches,) = session.run(["patch_tokens"], {"pixel_values": pixels.numpy()})
        assert patches.shape == (rows, high * wide, spec.width)
        if dtype == "fp32":
            with torch.no_grad():
                expected = ours(pixels).patch_tokens
            torch.testing.assert_close(torch.from_numpy(patches), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.usefixtures("_unchecked_shapes")
def test_write_onnx__bf16_is_half_the_size(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    spec = ViTSpec(width=128, depth=1, heads=2, ffn_width=512)
    source = write_network(tmp_path / "small", spec)
    for dtype in (torch.float32, torch.bfloat16):
        write_onnx(load_backbone(source)[0], spec, tmp_path / f"{dtype}.onnx", dtype=dtype)
    full, half = ((tmp_path / f"{each}.onnx").stat().st_size for each in DTYPES.values())
    assert 0.5 < half / full < 0.6  # the graph itself does not shrink


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", SPECS)
def test_export_network__metas_keys_give_the_same(kind: str, dtype: Dtype, tmp_path: Path) -> None:
    """Meta's code is no package, so its published key names are run by a plain second implementation."""
    spec = SPECS[kind]
    source = write_network(tmp_path / "small", spec)
    done = export(source, tmp_path / "out" / "small", "meta", dtype)
    (file,) = done.folder.glob("*.pth")
    assert file.name == f"small-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"
    weights = torch.load(file, weights_only=True)
    expected = our_features(source, DTYPES[dtype])
    run = meta_vit if isinstance(spec, ViTSpec) else meta_convnext
    theirs = [run(weights, spec, pixels) for pixels in probes(spec.stride, spec.in_channels)]
    assert max(largest_differences(expected, theirs)) < 1e-5  # fp32 rounding


def test_export_network__timm_folder_has_names_and_pooling(tmp_path: Path) -> None:
    spec = ViTSpec(width=384, depth=12, heads=6, ffn_width=1536)
    source = write_network(tmp_path / "small", spec)
    done = export(source, tmp_path / "out" / "small", "timm")
    config = json.loads((done.folder / "config.json").read_text())
    assert config["architecture"] == "vit_small_patch16_dinov3_qkvb"
    assert config["num_classes"] == 0 and config["model_args"]["global_pool"] == "token"
    assert config["pretrained_cfg"]["mean"] == list(INPUTS.mean)
    with safe_open(done.folder / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert {"cls_token", "reg_token", "blocks.0.attn.q_bias", "blocks.11.gamma_2"} <= keys
    assert "mask_token" not in keys


@pytest.mark.parametrize("form", ["hf", pytest.param("onnx", marks=pytest.mark.slow)])
def test_export_network__swapped_queries_and_keys_are_rejected(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
        request.getfixturevalue("_unchecked_shapes")
    source = write_network(tmp_path / "small", VIT)
    broken = write_network(tmp_path / "broken", VIT)
    swap_queries_and_keys(broken)
    right_convert, right_load = to_hf.convert, to_onnx.load_backbone
    monkeypatch.setattr(
        to_hf, "convert", lambda _, *rest, **more: right_convert(broken, *rest, **more)
    )
    monkeypatch.setattr(to_onnx, "load_backbone", lambda _: right_load(broken))
    with pytest.raises(
        UserError, match=r"small as .*features differ.*at most 0.0001 is allowed"
    ) as failed:
        export(source, tmp_path / "out" / "small", form)
    assert failed.value.exit_code == 1
    assert names(tmp_path / "out") == {"small.rejected"}
    assert not names(tmp_path / "out" / "small.rejected") & {"README.md", "distill.json"}


def swap_queries_and_keys(folder: Path) -> None:
    backbone, spec = load_backbone(folder)
    weights = dict(backbone.state_dict())
    for block in range(VIT.depth):
        query, key = (f"layer.{block}.attention.{each}_proj.weight" for each in "qk")
        weights[query], weights[key] = weights[key], weights[query]
    write_backbone(folder, weights, spec, ExportFacts(64, INPUTS.mean, INPUTS.std, {}))


def test_export_network__unreadable_files_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_network(tmp_path / "small", VIT)
    right_convert = to_hf.convert

    def forgetful(source: Path, target: Path, **how: Any) -> None:
        right_convert(source, target, **how)
        config = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))

    monkeypatch.setattr(to_hf, "convert", forgetful)
    with pytest.raises(UserError, match=r"cannot use the files: .*not every tensor was taken"):
        export(source, tmp_path / "out" / "small", "hf")
    assert names(tmp_path / "out") == {"small.rejected"}


def test_export_network__a_library_that_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    done = export(write_network(tmp_path / "a", VIT), tmp_path / "out" / "small", "hf")
    assert done.parity == Parity(None, "transformers is not installed")
    assert "not checked: transformers is not installed" in (done.folder / "README.md").read_text()
    with pytest.raises(SetupError, match="onnx and onnxscript not installed") as failed:
        require_exporter()
    assert failed.value.fix == 'pip install "distill-family[onnx]"'


def test_prove__a_library_that_does_not_import_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr("importlib.import_module", fail)
    found = verify(exporter_of("timm"), tmp_path, tmp_path, torch.float32)
    assert found.describe() == (
        "not checked: timm does not import here (operator torchvision::nms does not exist)"
    )
    assert not found.is_mismatch


def test_export_network__replaces_its_own_and_nothing_else(tmp_path: Path) -> None:
    source = write_network(tmp_path / "small", VIT)
    target = tmp_path / "out" / "small"
    export(source, target, "hf", "bf16")
    (target / "old").touch()
    export(source, target, "hf")
    assert "old" not in names(target)
    with pytest.raises(CheckpointError, match="is the network to export itself"):
        export(source, source, "hf")
    other = write_network(tmp_path / "other", VIT, seed=1)
    before = fingerprint(load_backbone(other)[0].state_dict())
    with pytest.raises(CheckpointError, match="exists and is no export of distill"):
        export(source, other, "hf")
    assert fingerprint(load_backbone(other)[0].state_dict()) == before


def test_export_network__a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Parity:
        raise OSError("no space left")

    monkeypatch.setattr("distill.export.export.verify", full)
    with pytest.raises(OSError, match="no space left"):
        export(write_network(tmp_path / "small", VIT), tmp_path / "out" / "small", "hf")
    assert not (tmp_path / "out").exists()


def test_export_network__card_and_record_say_where_it_comes_from(tmp_path: Path) -> None:
    source = write_network(tmp_path / "small", VIT)
    done = export(source, tmp_path / "out" / "small", "hf", licences=CC0)
    card = (done.folder / "README.md").read_text()
    weights = done.folder / "model.safetensors"
    checksum = hashlib.sha256(weights.read_bytes()).hexdigest()
    for said in (
        "library_name: transformers",
        "license: cc0-1.0",
        "recipe: family (hash feed, 7 steps)",
        "teacher: big (vitl16, 303 parameters, fingerprint 12ab)",
        "766 images from photographs (fingerprint 34cd)",
        "- big: cc0-1.0; files: `LICENSE`",
        "| this network | 0.800 |",
        "| the same network untrained | 0.500 |",
        "| its teacher | 0.900 |",
        "| colour mean and spread | 0.600 |",
        "AutoModel.from_pretrained(folder)",
        f"| model.safetensors | {weights.stat().st_size:,} | {checksum} |",
    ):
        assert said in card
    record = json.loads((done.folder / "distill.json").read_text())
    assert record["steps"] == 7 and record["licences"] == CC0.to_json()
    assert (done.folder / "LICENSE").read_bytes() == b"CC0 1.0"
    assert "LICENSE" in record["files"]
    assert record["export"]["checked_with"] == f"transformers {transformers.__version__}"
    assert record["export"]["largest_difference"]["class_token"] < TOLERANCE
    assert record["files"]["model.safetensors"]["sha256"] == checksum


def test_export_network__card_of_a_run_without_scores_or_licence(tmp_path: Path) -> None:
    source = write_network(tmp_path / "small", VIT)
    done = export(source, tmp_path / "out" / "small", "hf", scores={"knn_reason": "no classes"})
    card = (done.folder / "README.md").read_text()
    assert "No k-NN scores: no classes." in card
    assert "None is stated for this network." in card
    assert "license:" not in card


def test_largest_differences__nan_and_shapes_are_not_agreement() -> None:
    ours = [(torch.zeros(1, 2), torch.zeros(1, 3, 2))] * 2
    bad = [(torch.zeros(1, 2), torch.full((1, 3, 2), math.nan)), ours[0]]
    found = Parity("x 1", "", *largest_differences(ours, bad))
    assert math.isnan(found.patch_tokens or 0.0) and found.is_mismatch
    assert found.to_json()["largest_difference"] == {"class_token": 0.0, "patch_tokens": "nan"}
    with pytest.raises(ValueError, match=r"features of shape \[1, 4\], ours \[1, 2\]"):
        largest_differences(ours, [(torch.zeros(1, 4), torch.zeros(1, 3, 2))] * 2)


def test_largest_differences__are_in_parts_of_the_features_size() -> None:
    ours = [(torch.tensor([[3.0, -4.0]]), torch.zeros(1, 3, 2))] * 2
    near = [(torch.tensor([[3.0, -4.5]]), torch.full((1, 3, 2), 0.25)), ours[0]]
    wanted = 0.125, 0.25  # where all of ours are 0, what differs counts as it is
    assert largest_differences(ours, near) == pytest.approx(wanted, rel=1e-12)
    large, close = (
        [(1e3 * each, 1e3 * patches) for each, patches in part] for part in (ours, near)
    )
    assert largest_differences(large, close)[0] == pytest.approx(wanted[0], rel=1e-6)


def test_exporters__every_name_of_the_table() -> None:
    modules = {
        "hf": to_hf,
        "timm": to_timm,
        "meta": to_meta,
        "onnx": to_onnx,
        "factory": to_factory,
    }
    assert {name: exporter_of(name) for name in BUILTIN[ExtensionKind.EXPORTER]} == {
        name: module.EXPORTER for name, module in modules.items()
    }
    assert all(exporter_of(name).name == name for name in BUILTIN[ExtensionKind.EXPORTER])
