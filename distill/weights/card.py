"""The README.md of an exported folder: what the network is, what it scored, how to load it, and its checksums.

Only what is known is written. A licence is copied from the teacher's folder where it states one; a
score stands beside its baselines.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from distill.runfolder.status import KNN_K, TEACHER
from distill.weights.containers import read_object
from distill.weights.exporter import Exporter
from distill.weights.verify import Parity
from students.shapes import BackboneSpec

UNKNOWN_LICENCE = "unknown: check the teacher's licence"
FRONT_MATTER_KEYS = ("license", "license_name", "license_link")


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
    exporter: Exporter,
    dtype: str,
    background: Background,
    parity: Parity,
    files: tuple[WrittenFile, ...],
) -> str:
    """The text of README.md."""
    size = sum(file.num_bytes for file in files) / 1e6
    provenance = background.provenance
    facts = [
        f"recipe: {_known(provenance, 'recipe')} (hash {_known(provenance, 'recipe_hash')}, "
        f"{_known(provenance, 'steps')} steps)",
        *([f"parked {provenance['parked']}"] if "parked" in provenance else []),
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
            f"library_name: {exporter.library}",
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
            "```python",
            *exporter.usage(name, spec, [file.name for file in files]),
            "```",
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
