"""The README.md of an exported folder: what the network is, what it scored, how to load it, and its checksums.

Only what is known is written. A licence is copied from the teacher's folder where it states one; a
score stands beside its baselines.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from distill.runfolder.status import KNN_K, TEACHER
from distill.weights.containers import read_object
from distill.weights.verify import Format, Parity
from students.shapes import CATALOG, BackboneSpec, ConvNeXtSpec
from teacher.shapes import ViTSpec

UNKNOWN_LICENCE = "unknown: check the teacher's licence"
FRONT_MATTER_KEYS = ("license", "license_name", "license_link")
LIBRARY_NAMES: Mapping[Format, str] = {
    "hf": "transformers",
    "timm": "timm",
    "meta": "dinov3",
    "onnx": "onnx",
}
SWIGLU_SHARE = 2 / 3  # Meta's ffn_ratio counts the width before a gated layer is cut to two thirds


@dataclass(frozen=True)
class Background:
    """Where a network comes from, in words and figures of its run."""

    teacher: str
    data: str
    licence: Mapping[str, str]
    provenance: Mapping[str, Any]
    scores: Mapping[str, Any]


@dataclass(frozen=True)
class WrittenFile:
    """One file of the folder."""

    name: str
    num_bytes: int
    sha256: str


def teacher_licence(folder: Path) -> dict[str, str]:
    """What ``distill.json`` or the head of ``README.md`` in the teacher's folder holds; empty when neither has it."""
    stated = folder / "distill.json"
    if stated.is_file():
        facts = read_object(stated)
        for key in ("licence", "license"):
            if facts.get(key) and facts[key] != UNKNOWN_LICENCE:
                return {"license": str(facts[key])}
    card = folder / "README.md"
    head = _front_matter(card.read_text(encoding="utf-8")) if card.is_file() else {}
    return {key: str(head[key]) for key in FRONT_MATTER_KEYS if head.get(key)}


def licence_text(licence: Mapping[str, str]) -> str:
    """The licence in one line."""
    return ", ".join(licence.values()) or UNKNOWN_LICENCE


def model_card(
    name: str,
    spec: BackboneSpec,
    form: Format,
    dtype: str,
    background: Background,
    parity: Parity,
    files: tuple[WrittenFile, ...],
) -> str:
    """The text of README.md."""
    size = sum(file.num_bytes for file in files) / 1e6
    facts = [
        f"recipe: {_known(background.provenance, 'recipe')} (hash {_known(background.provenance, 'recipe_hash')}, "
        f"{_known(background.provenance, 'steps')} steps)",
        f"teacher: {background.teacher}",
        f"data: {background.data}",
        f"licence of the teacher: {licence_text(background.licence)}",
        f"weights: {dtype}, {spec.parameters:,} parameters, {size:.1f} MB; "
        f"one patch is {spec.stride} x {spec.stride} pixels",
        f"checked: {parity.describe()}",
    ]
    return "\n".join(
        [
            "---",
            f"library_name: {LIBRARY_NAMES[form]}",
            "pipeline_tag: image-feature-extraction",
            *(f"{key}: {json.dumps(value)}" for key, value in background.licence.items()),
            "---",
            "",
            f"# {name}",
            "",
            "Vision backbone that gives one class feature and one feature per patch of an image.",
            "",
            *(f"- {fact}" for fact in facts),
            "",
            "## Load it",
            "",
            *_loading(name, spec, form, files),
            "",
            "Images: RGB in [0, 1], resized, normalised; numbers in `preprocessor_config.json`. Sides are "
            f"multiples of {spec.stride} px.",
            "",
            "## Scores",
            "",
            *_scores(name, background.scores),
            "",
            "## Files",
            "",
            "| file | bytes | sha256 |",
            "| --- | ---: | --- |",
            *(f"| {file.name} | {file.num_bytes:,} | {file.sha256} |" for file in files),
            "",
        ]
    )


def _front_matter(text: str) -> dict[str, Any]:
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        head = YAML(typ="safe").load(parts[1])
    except YAMLError:
        return {}  # someone else's card; then it states nothing that we can read
    return head if isinstance(head, dict) else {}


def _known(facts: Mapping[str, Any], key: str) -> str:
    return str(facts[key]) if key in facts else "unknown"


def _scores(name: str, summary: Mapping[str, Any]) -> list[str]:
    """Rows of k-NN scores: this network, its untrained copy, its teacher and the baselines."""
    entry = summary.get("teacher", {}) if name == TEACHER else summary.get("students", {}).get(name)
    if not entry or entry.get("knn") is None:
        reason = summary.get("knn_reason", "the run was not scored")
        return [f"No k-NN scores: {reason}."]
    baselines = summary.get("baselines", {})
    rows = {
        "this network": entry["knn"],
        "the same network untrained": baselines.get("untrained", {}).get(name),
        "its teacher": None if name == TEACHER else summary.get("teacher", {}).get("knn"),
        "raw pixels": baselines.get("pixels"),
        "colour mean and spread": baselines.get("colour"),
    }
    return [
        f"k-NN on held-out images of the run, k = {KNN_K}, balanced accuracy:",
        "",
        "| | k-NN |",
        "| --- | ---: |",
        *(f"| {label} | {score:.3f} |" for label, score in rows.items() if score is not None),
    ]


def _loading(
    name: str, spec: BackboneSpec, form: Format, files: tuple[WrittenFile, ...]
) -> list[str]:
    """A code block that ends with ``backbone``, or with the outputs of a session."""
    if form == "meta":
        (weights,) = (file.name for file in files if file.name.endswith(".pth"))
        lines = _loading_meta(spec, f"{name}/{weights}")
    else:
        lines = {
            "hf": [
                "from transformers import AutoImageProcessor, AutoModel",
                "",
                f'prepare = AutoImageProcessor.from_pretrained("{name}")',
                f'backbone = AutoModel.from_pretrained("{name}")',
            ],
            "timm": [
                "import timm",
                "",
                f'backbone = timm.create_model("local-dir:{name}", pretrained=True).eval()',
            ],
            "onnx": [
                "import onnxruntime",
                "",
                f'session = onnxruntime.InferenceSession("{name}/model.onnx")',
                "class_token, patch_tokens = session.run(",
                '    ["class_token", "patch_tokens"], {"pixel_values": pixels}',
                ")  # pixels: float32, [images, 3, height, width]",
            ],
        }[form]
    return ["```python", *lines, "```"]


def _loading_meta(spec: BackboneSpec, path: str) -> list[str]:
    """Through Meta's hub entry for a published size, through its classes for any other."""
    published = [arch for arch, known in CATALOG.items() if known == spec]
    if published:
        entry = f'"facebookresearch/dinov3", "dinov3_{published[0]}"'
        return [
            "import torch",
            "",
            f'backbone = torch.hub.load({entry}, weights="{path}")',
        ]
    assert type(spec) in _META_CODE, f"a {type(spec).__name__} is not written for Meta's code"
    module, class_, arguments = _META_CODE[type(spec)](spec)
    return [
        "import torch",
        f"from dinov3.models.{module} import {class_}",
        "",
        f"backbone = {class_}(",
        *(f"    {line}" for line in arguments),
        ")",
        f'backbone.load_state_dict(torch.load("{path}", weights_only=True))',
    ]


def _meta_vit(spec: ViTSpec) -> tuple[str, str, list[str]]:
    is_gated = spec.ffn == "swiglu"
    ratio = spec.ffn_width / spec.width / (SWIGLU_SHARE if is_gated else 1.0)
    arguments = [
        f"patch_size={spec.patch}, embed_dim={spec.width}, depth={spec.depth}, num_heads={spec.heads},",
        f'ffn_ratio={ratio:g}, ffn_layer="{"swiglu" if is_gated else "mlp"}", qkv_bias={spec.qv_bias},',
        f'n_storage_tokens={spec.registers}, norm_layer="layernormbf16", layerscale_init=1.0,',
        'mask_k_bias=True, pos_embed_rope_dtype="fp32",',
    ]
    return "vision_transformer", "DinoVisionTransformer", arguments


def _meta_convnext(spec: ConvNeXtSpec) -> tuple[str, str, list[str]]:
    return "convnext", "ConvNeXt", [f"depths={list(spec.depths)}, dims={list(spec.widths)},"]


# type of spec -> module, class and arguments in Meta's code
_META_CODE: Mapping[type, Callable[[Any], tuple[str, str, list[str]]]] = {
    ViTSpec: _meta_vit,
    ConvNeXtSpec: _meta_convnext,
}
