"""The card of a folder: true for how the network was trained, valid for Hugging Face, and its code runs."""

import json
import re
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from ruamel.yaml import YAML

from distill.export.card import (
    Background,
    Inputs,
    folder_form,
    method_of,
    model_card,
    read_inputs,
)
from distill.export.export import export_network
from distill.export.licences import Licences, Terms
from distill.export.to_meta import EXPORTER as META
from distill.export.to_onnx import EXPORTER as ONNX
from distill.export.to_timm import EXPORTER as TIMM
from students.shapes import BackboneSpec, CustomSpec
from tests.support.exports import BACKGROUND, CONVNEXT, GATED, INPUTS, VIT, write_network

DINO = Licences(
    (Terms("big", ("dinov3-license",), "DINOv3 License", files=("LICENSE.md",)),),
    {"LICENSE.md": b"# DINOv3 License"},
)
PLAIN = {key: value for key, value in BACKGROUND.record.items() if not key.startswith("teacher")}


def card_of(record: dict[str, Any], licences: Licences = DINO, scores: Any = None) -> str:
    background = Background(record, licences, scores or {})
    return model_card("small", VIT, INPUTS, background, folder_form("small", VIT, 2_500_000))


def head_of(card: str) -> dict[str, Any]:
    head: dict[str, Any] = YAML(typ="safe").load(card.split("---\n")[1])
    return head


def blocks_of(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def run_blocks(card: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Runs each block by itself beside the folder of a card; the names that it leaves."""
    monkeypatch.chdir(card.parent.parent)
    spaces: list[dict[str, Any]] = []
    for block in blocks_of(card.read_text()):
        space: dict[str, Any] = {}
        exec(compile(block, str(card), "exec"), space)
        spaces.append(space)
    return spaces


@pytest.mark.parametrize("spec", [VIT, GATED, CONVNEXT])
def test_code__of_a_students_folder_runs_and_agrees(
    spec: BackboneSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_network(tmp_path / "students" / "small", spec)
    theirs, ours = run_blocks(folder / "README.md", monkeypatch)
    patches = (64 // spec.stride) ** 2
    for space in (theirs, ours):
        assert space["class_feature"].shape == (1, spec.width)
        assert space["patch_features"].shape == (1, patches, spec.width)
    torch.testing.assert_close(theirs["class_feature"], ours["class_feature"], atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs["patch_features"], ours["patch_features"], atol=1e-5, rtol=0)
    assert "AutoImageProcessor" not in "".join(blocks_of((folder / "README.md").read_text()))
    assert "needs torchvision" in (folder / "README.md").read_text()


def test_code__of_a_meta_file_runs_by_our_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_network(tmp_path / "small", VIT)
    done = export_network("small", source, tmp_path / "m/small", META, "fp32", BACKGROUND, INPUTS)
    (ours,) = run_blocks(done.folder / "README.md", monkeypatch)
    assert ours["class_feature"].shape == (1, VIT.width)
    assert "from dinov3.models.vision_transformer" in (done.folder / "README.md").read_text()


@pytest.mark.slow
def test_onnx__holds_the_licence_and_its_code_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    # the exporter traces with symbolic sizes, which the shape checks of the suite refuse
    jaxtyping.config.update("jaxtyping_disable", True)
    request.addfinalizer(lambda: jaxtyping.config.update("jaxtyping_disable", False))
    source = write_network(tmp_path / "small", VIT)
    told = Background(BACKGROUND.record, DINO, {})
    done = export_network("small", source, tmp_path / "o/small", ONNX, "fp32", told, INPUTS)
    (space,) = run_blocks(done.folder / "README.md", monkeypatch)
    assert space["class_feature"].shape == (1, VIT.width)
    props = {each.key: each.value for each in onnx.load(done.folder / "model.onnx").metadata_props}
    assert props["license_name"] == "dinov3-license"
    assert props["license_text:LICENSE.md"] == "# DINOv3 License"
    assert (done.folder / "LICENSE.md").read_bytes() == b"# DINOv3 License"
    record = json.loads((done.folder / "distill.json").read_text())
    assert record["licences"] == DINO.to_json()


def test_timm__config_names_the_licence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"pretrained_cfg": {"license": "x", "mean": 1}}')
    TIMM.attach(tmp_path, DINO.metadata())
    config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert config == {"license": "dinov3-license", "mean": 1}
    TIMM.attach(tmp_path, {})
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["license"] == (
        "unknown"
    )


def test_code__of_a_custom_network_is_distills_only() -> None:
    spec = CustomSpec("mine.nets:make", '{"depth": 2}', 8, 4, 100)
    form = folder_form("toy", spec, 10)
    assert form.library == "distill" and len(form.blocks) == 1
    assert "probe('mine.nets:make', '{\"depth\": 2}')" in "\n".join(form.blocks[0][1])


def test_card__is_true_for_a_distilled_student() -> None:
    further = {"teacher": {"name": "giant", "teacher": {"name": "first"}}}
    teacher = {**BACKGROUND.record["teacher"], "sha256": "ab" * 32, **further}
    card = card_of({**BACKGROUND.record, "teacher": teacher, "base_model": "facebook/dinov3-x"})
    head = head_of(card)
    assert head["pipeline_tag"] == "image-feature-extraction"
    assert (head["license"], head["license_name"]) == ("other", "dinov3-license")
    assert head["base_model"] == "facebook/dinov3-x" and head["library_name"] == "transformers"
    assert "knowledge-distillation" in head["tags"]
    for said in (
        "Distilled from a frozen teacher",
        f"- teacher: big (vitl16, 303 parameters, sha256 of its weights {'ab' * 32}, fingerprint "
        "12ab); itself distilled from giant, that from first\n",
        "- data: 766 images from photographs (fingerprint 34cd)\n",
        "- recipe: family (hash feed, 7 steps)\n",
        f"- weights: fp32, {VIT.parameters:,} parameters, 2.5 MB\n",
        "64 x 64 pixels, minus mean (0.5, 0.5, 0.5), divided by standard deviation (0.25, 0.25, 0.25)",
        "one patch is 8 x 8 pixels",
        "- big: DINOv3 License; files: `LICENSE.md`\n",
        "No k-NN scores: the run was not scored.",
    ):
        assert said in card
    assert "self-" not in card and "Apache" not in card


def test_card__is_true_for_a_pretrained_and_for_a_given_network() -> None:
    card = card_of({**PLAIN, "method": "pretraining"}, Licences((Terms("me", is_pretrained=True),)))
    assert "self-supervised pretraining" in card and "istilled" not in card
    assert "teacher:" not in card and "license" not in head_of(card)
    given = card_of({}, Licences((Terms("x", problem="its folder states no licence"),)))
    assert "Not trained by distill" in given and "EMA" not in given and "recipe:" not in given
    assert head_of(given)["license"] == "unknown"
    assert "- x: unknown: its folder states no licence" in given
    assert "Find the licence out" in given


@pytest.mark.parametrize(
    ("record", "method"),
    [
        ({}, ""),
        ({"recipe_hash": "1"}, "pretraining"),
        ({"recipe_hash": "1", "teacher_fingerprint": "2"}, "distillation"),
        ({"recipe_hash": "1", "method": "distillation"}, "distillation"),
    ],
)
def test_method_of__records_of_0_1_0_too(record: dict[str, str], method: str) -> None:
    assert method_of(record) == method


def test_card__a_licence_without_its_text_says_so() -> None:
    card = card_of(BACKGROUND.record, Licences((Terms("big", ("mit",)),)))
    assert "licence of big did not lie beside its weights" in card
    assert "did not lie" not in card_of(BACKGROUND.record)


def test_card__names_the_protocol_of_its_scores() -> None:
    scores = {"students": {"small": {"knn": 0.5, "knn_in": "bfloat16"}}, "teacher": {"knn": 0.75}}
    card = card_of(BACKGROUND.record, scores=scores)
    assert "k = 5, cosine similarity" in card and "balanced accuracy" in card
    assert "computed in bfloat16" in card and "| its teacher | 0.750 |" in card


def test_read_inputs__of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"size": {"shortest_edge": 256}, "image_mean": [0.1, 0.2, 0.3]}))
    assert read_inputs(path) == Inputs(256, (0.1, 0.2, 0.3), (0.229, 0.224, 0.225))
    path.write_text(json.dumps({"size": 64}))
    assert read_inputs(path).size == 64
